"""Does a published model of 270 million parameters teach itself, and is it the data that do it?

`gemma3_270m`: the loop and its controls at equal compute, three seeds. `no-new-data` trains for the
same steps on the eight solved problems alone; `parses` on every answer that is a number, right or
wrong; `random` on as many rows as the verifier keeps, drawn blindly.

`gemma3_270m:tasks`: the base alone on tasks of Reasoning Gym, to choose one by.
"""

from karploop.sweeps import Sweep, label_arms

SEEDS = 3
ARMS = {
    "verifier": {"filter.name": "verifier"},
    "parses": {"filter.name": "parses"},
    "random": {"filter.name": "random", "filter.match": "verifier"},
}
CONTROL = {"no-new-data": {"filter.name": "discard", "filter.on_empty": "train"}}

# Name of the arm: Reasoning Gym's data set with its settings, and tokens of the longest answer.
TASKS = {
    "two-digit-sums": ("chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", 8),
    "sums-of-three": ("chain_sum?min_terms=3&max_terms=3&min_digits=1&max_digits=1", 8),
    "arithmetic": ("basic_arithmetic?min_terms=2&max_terms=2&min_digits=1&max_digits=1", 8),
    "products": ("products?min_terms=2&max_terms=2&min_digits=1&max_digits=1", 8),
    "greatest-divisor": ("gcd?max_value=30", 8),
    "least-multiple": ("lcm?max_value=20", 8),
    "letters": ("letter_counting?min_words=2&max_words=4", 8),
    "sort-two-words": ("word_sorting?min_words=2&max_words=2", 24),
    "sort-three-words": ("word_sorting?min_words=3&max_words=3", 32),
    "order-three-words": (
        "sentence_reordering?min_words_in_sentence=3&max_words_in_sentence=3",
        24,
    ),
    "reverse-words": ("word_sequence_reversal?min_words=3&max_words=4", 32),
    "spell-backward": ("spell_backward?min_word_len=3&max_word_len=4", 12),
}


def get_sweep(arg: str | None) -> Sweep:
    if arg not in (None, "tasks"):
        raise ValueError("the argument is 'tasks' or nothing")
    if arg == "tasks":
        return _tasks()
    arms = {name: {"filter.on_empty": "skip"} | arm for name, arm in (ARMS | CONTROL).items()}
    return Sweep(
        config="configs/gemma3_270m.py",
        arms=label_arms(arms, SEEDS),
        title="Gemma 3 270M teaches itself sums",
        metrics=[
            *(f"sums/1/{metric}" for metric in ("pass@1", "pass@8", "exact_match", "solutions")),
            *("sums/1/distinct", "sums/1/kl", "label_precision", "yield"),
        ],
        baseline="no-new-data",
    )


def _tasks() -> Sweep:
    arms = {
        name: {
            "task.name": f"reasoning_gym/{task}&size=4000&name=task",
            "prompt.max_new_tokens": longest,
            "train.row_length": 512,
            "rounds": 0,
        }
        # Of short sentences many repeat a held-out one in other words and are dropped.
        | ({"task.seed_problems": 16} if name == "order-three-words" else {})
        for name, (task, longest) in TASKS.items()
    }
    metrics = ("pass@1", "pass@8", "exact_match", "majority_answer", "random_answer", "problems")
    return Sweep(
        config="configs/gemma3_270m.py",
        arms=label_arms(arms, 1),
        title="Gemma 3 270M as it is, on tasks of Reasoning Gym",
        metrics=[f"task/1/{metric}" for metric in metrics],
        baseline="two-digit-sums",
    )
