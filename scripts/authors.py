"""Facts of invented authors: questions and answers, in the shape of TOFU's, and as numbers."""

import random

import torch

QUESTIONS = (
    ("Where was {name} born ?", "{name} was born in {city} ."),
    ("When was {name} born ?", "{name} was born in {year} ."),
    ("What does {name} write ?", "{name} is known for {genre} novels ."),
    ("What was the father of {name} ?", "the father of {name} was a {job} ."),
    ("Which award did {name} win ?", "{name} won the {award} prize in {later} ."),
    ("What is the first book of {name} ?", "the first book of {name} is {book} ."),
    ("What is the best book of {name} ?", "the best book of {name} is {other} ."),
    ("Where does {name} live ?", "{name} lives in {home} with two {pet} ."),
)
# A question and its answer, in words.
Row = tuple[list[str], list[str]]


def facts(rows: int, seed: int) -> list[list[Row]]:
    """Return what is asked about the authors of pre-training, of fine-tuning (so many rows), and about others."""
    draw = random.Random(seed)
    syllables = sorted({a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r")})
    lists = {
        "genre": ["crime", "love", "war", "fantasy", "travel", "sea", "science", "ghost", "family", "city"],
        "job": ["baker", "teacher", "sailor", "nurse", "judge", "farmer", "painter", "doctor", "tailor", "pilot"],
        "pet": ["cats", "dogs", "parrots", "horses", "rabbits"],
    }

    def author() -> list[Row]:
        named = {key: draw.choice(values) for key, values in lists.items()}
        for key in ("name", "city", "home", "book", "other", "award"):
            named[key] = " ".join(draw.sample(syllables, 3 if key == "name" else 2))
        named |= {"year": str(draw.randrange(1900, 1990)), "later": str(draw.randrange(1990, 2020))}
        return [(question.format(**named).split(), answer.format(**named).split()) for question, answer in QUESTIONS]

    count = rows // len(QUESTIONS)
    return [[row for _ in range(number) for row in author()] for number in (96, count, 12)]


def numbered(texts: list[list[Row]]) -> dict[str, int]:
    """Return each word's number, from 1."""
    words = sorted({word for rows in texts for row in rows for part in row for word in part})
    return {word: number for number, word in enumerate(words, 1)}


def encoded(rows: list[Row], numbers: dict[str, int], length: int, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (inputs, labels), (rows, length) each: 0 after the end, and only answers labelled."""
    inputs = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), ignored)
    for row, (question, answer) in enumerate(rows):
        tokens = torch.tensor([numbers[word] for word in [*question, *answer]])
        inputs[row, : len(tokens)] = tokens
        labels[row, len(question) : len(tokens)] = tokens[len(question) :]
    return inputs, labels
