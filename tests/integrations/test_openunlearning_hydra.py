"""How the trainers come into a checkout of OpenUnlearning: Hydra's search path, the registry, and nothing elsewhere."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from openunlearning_checkout import Checkout, Texts, texts
from trainers import new_model

import timstore.integrations.conf
from timstore.integrations.openunlearning import TIMParameterRollback, TIMRecorder
from timstore.integrations.openunlearning.trainer import RecorderArguments, RollbackArguments

ROOT = Path(__file__).parents[2]
NAMES = ("TIMParameterRollback", "TIMRecorder")


@pytest.fixture(autouse=True)
def no_other_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The checkout's own configurations, as far as a trainer's needs them."""
    folder = tmp_path / "configs"
    (folder / "trainer").mkdir(parents=True)
    (folder / "train.yaml").write_text("defaults:\n  - trainer: finetune\n")
    (folder / "trainer" / "finetune.yaml").write_text(
        "handler: FinetuneTrainer\nargs:\n  learning_rate: 1e-5\n  optim: paged_adamw_32bit\n  eval_strategy: epoch\n"
    )
    return folder


def composed(configs: Path, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(configs), version_base=None):
        return hydra.compose("train.yaml", list(overrides)).trainer


@pytest.mark.parametrize("name", NAMES)
def test_a_checkout_that_stays_as_it_is_has_the_trainers(
    name: str, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Checkout("tokenizer")
    checkout.install(monkeypatch)
    found = composed(configs, f"trainer={name}", f"trainer.method_args.tim_output_dir={tmp_path}")
    assert found.handler == name
    assert found.args.learning_rate == 1e-5
    assert found.args.optim == "adamw_torch"
    trainer = checkout.load_trainer(
        found.handler,
        tmp_path,
        model=new_model("llama"),
        train_dataset=Texts(texts(2)),
        method_args=dict(found.method_args),
    )
    assert isinstance(trainer, {one.__name__: one for one in (TIMParameterRollback, TIMRecorder)}[name])
    assert isinstance(trainer, checkout.registry["FinetuneTrainer"])


def test_a_trainer_of_the_checkout_that_has_the_name_stays(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Checkout("tokenizer")
    checkout.registry["TIMRecorder"] = checkout
    checkout.install(monkeypatch)
    (configs / "trainer" / "TIMRecorder.yaml").write_text("handler: mine\n")
    assert composed(configs, "trainer=TIMRecorder").handler == "mine"
    assert checkout.registry["TIMRecorder"] is checkout
    assert "TIMParameterRollback" in checkout.registry


def test_in_another_program_there_is_nothing(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
    with pytest.raises(MissingConfigException):
        composed(configs, "trainer=TIMRecorder")
    monkeypatch.setitem(sys.modules, "trainer", pytest)  # a module of that name that is something else
    with pytest.raises(MissingConfigException):
        composed(configs, "trainer=TIMRecorder")


def test_another_hydra_program_neither_hears_of_it_nor_waits_for_it(configs: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, hydra\n"
        f"@hydra.main(version_base=None, config_path={str(configs)!r}, config_name='train')\n"
        "def main(cfg):\n"
        "    assert 'hydra_plugins.timstore_search_path' in sys.modules\n"
        "    assert not {'torch', 'timstore', 'transformers'} & sys.modules.keys()\n"
        "main()\n"
    )
    command = [sys.executable, str(script), "hydra.run.dir=" + str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_the_plugin_the_search_path_can_be_named(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
    (configs / "train.yaml").write_text(
        "defaults:\n  - trainer: finetune\n  - _self_\nhydra:\n  searchpath: [pkg://timstore.integrations.conf]\n"
    )
    assert composed(configs, "trainer=TIMRecorder").handler == "TIMRecorder"
    (folder,) = timstore.integrations.conf.__path__
    assert sorted(path.stem for path in Path(folder).glob("trainer/*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "arguments"), [("TIMParameterRollback", RollbackArguments), ("TIMRecorder", RecorderArguments)]
)
def test_the_configuration_has_every_argument_with_its_default(name: str, arguments: Any) -> None:
    (folder,) = timstore.integrations.conf.__path__
    held = OmegaConf.load(Path(folder) / "trainer" / f"{name}.yaml").method_args
    defaults = arguments.defaults()
    assert set(held) == set(defaults)
    for key, default in defaults.items():
        if default is MISSING:
            with pytest.raises(MissingMandatoryValue):
                held[key]
        else:
            assert held[key] == default


def test_nothing_of_the_checkout_is_imported(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("raise SystemError('imported')\n")
    (tmp_path / "data.py").write_text("raise SystemError('imported')\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import timstore.integrations.openunlearning\n"
        "assert not {'trainer', 'data', 'hydra', 'omegaconf'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_wheel_takes_the_plugin_along_and_leaves_the_namespace_to_all() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["timstore", "hydra_plugins"]
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists()
