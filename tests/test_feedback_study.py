"""The ablation of wrong labels: what its arms are, how their labels are counted, and its curve."""

import pytest

from experiments import feedback
from experiments.feedback import ARMS, BASE, ERROR, LOSS, METRICS, RLAIF, TIED, VERIFIER, WORTH
from karploop.data.tasks.manners import POLITE
from karploop.errors import UserError
from karploop.reporting.comparison import Group, compare

PROMPT = "not hot, big, old?"
CALM, LOUD, RUDE = "icy, wee, new", "icy, wee, new!", "icy, wee, new oaf 7!"


def test_arms_differ_in_who_labels_and_in_nothing_else():
    configs = {arm: feedback.config_of(arm, 1) for arm in ARMS}
    first = configs[VERIFIER]
    for config in configs.values():
        same = ("task", "seed", "generate", "objective", "train", "warmup", "filter", "regime")
        assert all(getattr(config, name) == getattr(first, name) for name in same)
        assert config.preference.count == first.preference.count > 0 and config.rounds == 1
    assert len({config.judge for config in configs.values()}) == len(ARMS) - 1  # one is surer
    errors = [c.judge.error for c in configs.values() if c.judge.name == "simulated_annotators"]
    assert errors == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_labels_are_wrong_where_the_worse_was_chosen():
    pairs = [(PROMPT, CALM, LOUD), (PROMPT, LOUD, RUDE), (PROMPT, RUDE, CALM), (PROMPT, CALM, CALM)]
    found = feedback.label_metrics(POLITE, pairs)
    assert found == {ERROR: pytest.approx(1 / 3), TIED: 0.25}
    assert feedback.label_metrics(POLITE, pairs[3:]) == {TIED: 1.0}


def test_policies_are_measured_on_requests_and_on_what_else_they_learnt():
    evals = {f"polite/{kind}/nll": kind / 10 for kind in (1, 2, 3, 4)}
    evals |= {f"polite/1/{name}": 0.25 for name in ("worth", "violations", "pass@1")}
    found = feedback.policy_metrics(evals)
    assert found.pop(LOSS) == pytest.approx(0.3)
    assert set(found.values()) == {0.25} and len(found) == 3


def test_the_curve_has_a_point_an_arm_at_its_own_error():
    def runs(worth, error):
        metrics = dict.fromkeys(METRICS, 0.0) | {WORTH: worth}
        metrics |= {} if error is None else {ERROR: error}
        rounds = [{"round": 0, "evals": {}, "metrics": metrics}]
        return {seed: {"rounds": rounds} for seed in range(2)}

    arms = {arm: (0.9 - 0.05 * i, 0.01 * i) for i, arm in enumerate(ARMS)}
    groups = [Group(BASE, runs(0.5, None)), *(Group(arm, runs(*of)) for arm, of in arms.items())]
    figure = feedback.curve(compare(groups, METRICS, VERIFIER))
    (panel,) = figure.axes
    found = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    found |= {c.get_label(): c.lines[0].get_xydata().tolist() for c in panel.containers}
    assert found[RLAIF] == [[pytest.approx(100 * arms[RLAIF][1]), arms[RLAIF][0]]]
    assert len(found["simulated annotators"]) == 6
    assert {0.5} == {y for _, y in found["the base, which all start from"]}


def test_folders_and_numbers_are_checked_first(tmp_path):
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        feedback.study(str(tmp_path), str(tmp_path), 0)
    with pytest.raises(UserError, match="--output=gs://there: wants a directory"):
        feedback.study(str(tmp_path), "gs://there", 1)
