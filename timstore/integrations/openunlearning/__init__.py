"""OpenUnlearning: a trainer that rolls samples back, and one that records the fine-tuning before.

In a checkout of OpenUnlearning whose environment has timstore both are there by their names, and no line of it changes:

    python src/train.py trainer=TIMRecorder trainer.method_args.tim_output_dir=DIR ...
    python src/train.py --config-name=unlearn.yaml trainer=TIMParameterRollback \
        trainer.method_args.tim_output_dir=DIR ...

Nothing of OpenUnlearning is imported here. docs/openunlearning.md tells how they come in, and what was tried.
"""

from timstore.integrations.openunlearning.recorder import TIMRecorder
from timstore.integrations.openunlearning.rollback import TIMParameterRollback
from timstore.legacy import save_gradient_trajectory

__all__ = ["TIMParameterRollback", "TIMRecorder", "save_gradient_trajectory"]
