"""The one place where a run's configuration is typed and bounded.

A config file (`configs/*.py`) returns a `ConfigDict` with whatever it wants to set; `resolve.py`
lays it and the command line's overrides over the defaults below, checks what spans several keys,
and returns frozen dataclasses. Each stage receives its own sub-config and nothing else, because the
sub-config is part of the stage's identity in the store: a key that a stage does not own cannot
change its result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from karploop.schema import option


@dataclass(frozen=True)
class TaskConfig:
    """Which problems there are, and how many of them come with labels."""

    # A registered task, "package.module:ATTRIBUTE", or where prompts are: file:PATH,
    # reasoning_gym/NAME?key=value, tfds/NAME:SPLIT?prompt=FIELD&answer=FIELD.
    name: str = "reverse_addition"
    seed_difficulty: int = option(5, low=1)  # labelled problems have difficulty 1 … this
    # Labelled problems in all. A published model learns from those it is shown as examples, or
    # from none with 0.
    seed_problems: int = option(20_000, low=0)
    held_out: float = option(0.1, low=0.001, high=0.9)  # share of every difficulty never trained on
    # Each labelled problem is learnt from in a second form, too, with its answer as a hint in the
    # prompt: a model learns so what a hint is, which `generate.rationalise` gives it.
    hints: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape. Its parameters are float32; `dtype` is what it computes in.

    The defaults are those of a small model trained from scratch. A published checkpoint brings its
    own values (`karploop/models/families.py`).
    """

    layers: int = option(3, low=1)
    width: int = option(128, low=1)
    heads: int = option(4, low=1)
    kv_heads: int = option(0, low=0)  # key-value heads, a divisor of heads; 0: as many as heads
    head_width: int = option(32, low=2)
    mlp_width: int = option(512, low=1)
    activation: str = option("gelu", choices=("gelu", "swiglu", "geglu"))
    max_length: int = option(128, low=4)  # longest sequence, prompt and completion together
    # Characters that it reads: those of its task, or all printable ones of ASCII, which prompts
    # from a file take, and judges and chains that ask it.
    alphabet: str = option("task", choices=("task", "ascii"))
    tied: bool = False  # the embedding is also the output matrix
    qkv_bias: bool = False
    out_bias: bool = False  # on attention's output
    mlp_bias: bool = False
    # Norms
    norm_epsilon: float = option(1e-6, low=0.0)
    norm_offset: bool = False  # scales are stored as their difference to 1
    post_norms: bool = False  # also after attention and feed-forward block
    qk_norm: bool = False  # on each head's queries and keys
    # Positions
    positions: str = option("none", choices=("none", "rope"))
    rope_base: float = option(10_000.0, low=1.0)
    rope_local_base: float = option(0.0, low=0.0)  # of sliding-window layers; 0: the same
    rope_scaling: str = option("none", choices=("none", "linear", "llama3"))
    rope_factor: float = option(1.0, low=1.0)
    rope_low: float = option(1.0, low=0.0)  # llama3: turns over the original context …
    rope_high: float = option(4.0, low=0.0)  # … below which to stretch, above which to keep
    rope_original_length: int = option(8192, low=1)  # llama3
    # Attention
    window: int = option(0, low=0)  # columns that a sliding-window layer sees; 0: no such layers
    pattern: str = "f"  # f full, s sliding window; repeated over the layers
    attention_scale: float = option(0.0, low=0.0)  # 0: 1/sqrt(head_width)
    attention_softcap: float = option(0.0, low=0.0)  # 0: none
    logit_softcap: float = option(0.0, low=0.0)  # 0: none
    embedding_scale: bool = False  # embeddings times sqrt(width)
    # Execution
    dtype: str = option("float32", choices=("float32", "bfloat16"))
    scan: bool = False  # one compiled layer body, parameters stacked
    # What the backward pass computes again: nothing, all but matrix products, everything.
    remat: str = option("none", choices=("none", "dots", "full"))

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is confined to the window."""
        repeated = self.pattern * (-(-self.layers // len(self.pattern)))
        return tuple(kind == "s" for kind in repeated[: self.layers])


@dataclass(frozen=True)
class RoleConfig:
    """What a role is bound to: weights on the mesh, or a model behind an address."""

    # A Hugging Face folder or a .gguf file, here or on an object store (gs://…), or package:NAME.
    # A policy without is trained from scratch.
    path: str = ""
    # In a loop, other roles than the policy: its weights of now (policy), before the first round
    # (base), or after one (round:3; until then, the newest there are); or those of the newest
    # reward model that the loop has trained (reward).
    weights: str = ""
    # auto: where there is a template; behind an address, always but for probabilities.
    chat: str = option("auto", choices=("auto", "yes", "no"))
    base_url: str = ""  # of an OpenAI-compatible server, as in http://localhost:8000/v1
    model: str = ""  # its name there
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    concurrency: int = option(16, low=1)  # calls in flight
    requests_per_minute: int = option(0, low=0)  # 0: no limit
    tokens_per_minute: int = option(0, low=0)  # of prompts and replies together; 0: no limit
    timeout: float = option(120.0, low=0.001)  # seconds from a call to its whole reply
    attempts: int = option(8, low=1)  # of a call, before it counts as failed
    input_price: float = option(0.0, low=0.0)  # dollars a million tokens
    output_price: float = option(0.0, low=0.0)
    cap: float = option(0.0, low=0.0)  # most dollars of a job; 0: no cap
    extra: str = ""  # a JSON object laid over each request; null removes a key


@dataclass(frozen=True)
class PromptConfig:
    """How a published model is asked. One trained from scratch reads problems as they are."""

    chat: bool = False  # by the model's chat template; else in plain text
    shots: int = option(0, low=0)  # solved examples before every prompt that is sampled from
    instruction: str = ""  # before the examples; in a chat, the system's message
    question: str = "{prompt}"
    answer: str = "{answer}"  # right behind the question; often with a space in front
    separator: str = "\n\n"  # between instruction, examples and question; not in a chat
    stop: str = ""  # where a completion ends besides the model's own stop tokens; empty: nowhere
    max_new_tokens: int = option(64, low=2)  # of a completion, its stop token included


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; −1 on one axis takes all that the others leave."""

    data: int = option(-1, low=-1)
    fsdp: int = option(1, low=-1)
    tensor: int = option(1, low=-1)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon under a warm-up, stable, decay schedule (fractions of the stage's length)."""

    name: str = option("adamw", choices=("adamw", "muon"))
    learning_rate: float = option(1e-3, low=0.0)  # peak
    muon_scale: float = option(7.0, low=0.0)  # muon: rate of layer matrices over learning_rate
    warmup: float = option(0.05, low=0.0, high=1.0)
    decay: float = option(0.33, low=0.0, high=1.0)
    final: float = option(0.02, low=0.0, high=1.0)  # last learning rate over the peak
    b1: float = option(0.9, low=0.0, high=1.0)
    b2: float = option(0.98, low=0.0, high=1.0)
    epsilon: float = option(1e-8, low=0.0)
    weight_decay: float = option(0.01, low=0.0)
    clip_norm: float = option(1.0, low=0.0)  # 0: no clipping


# The decoder's matrices that an adapter can be laid on, by the names of their parameters.
ADAPTABLE = ("query", "key", "value", "out", "up", "gate", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): W + (alpha / rank) · a · b, of which a and b learn.

    With alpha at twice the rank, as in the mathematics runs of arXiv 2405.09673, the scale is 2 for
    every rank. With alpha set, it is PEFT's alpha / rank.
    """

    rank: int = option(0, low=0)  # 0: off, every parameter is trained
    alpha: float = option(0.0, low=0.0)  # 0: twice the rank
    targets: str = "all"  # matrices, as in query,value; all: every matrix of every layer

    @property
    def scale(self) -> float:
        """What a · b is multiplied by; 0 where adaptation is off."""
        return (self.alpha or 2.0 * self.rank) / self.rank if self.rank else 0.0

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names in `targets`; of "all", those that some model has."""
        if self.targets == "all":
            return ADAPTABLE
        return tuple(name.strip() for name in self.targets.split(","))


@dataclass(frozen=True)
class TrainConfig:
    """One training stage: supervised fine-tuning on packed rows."""

    steps: int = option(300, low=1)
    # In place of steps, 0: off. The stage ends with the step in which this many tokens have been
    # read (prompts too, padding not), or with this many passes over its data.
    tokens: int = option(0, low=0)
    epochs: float = option(0.0, low=0.0)
    rows: int = option(8, low=1)  # packed rows a step
    row_length: int = option(128, low=4)  # tokens a row
    # Parts that a step's rows are taken in, one after the other, for less memory: the update is
    # that of all rows at once.
    accumulation: int = option(1, low=1)
    # A row holds the prompt of a pair once, or of as many samples of a prompt as fit behind it
    # (policy_gradient): the same gradients of fewer tokens. More texts go into a step, `tokens`
    # counts what is shared once, and an epoch sees every text once as before.
    share_prompts: bool = False
    # union: every row of the accumulated data is drawn equally often; by_difficulty: difficulties
    # are drawn in proportion to their value, whatever the number of their rows.
    mixing: str = option("union", choices=("union", "by_difficulty"))
    newest_share: float = option(0.0, low=0.0, high=1.0)  # of draws, from this round's rows; 0: off
    checkpoint_every: int = option(100, low=1)  # steps between mid-stage checkpoints
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()  # of `train` alone: a warm-up has nothing to adapt


@dataclass(frozen=True)
class PreferenceConfig:
    """Which completions of a prompt make a pair of a better and a worse one."""

    # best_worst: the highest and the lowest score; all_pairs: each with each; consistent: those
    # that a judge decides alike in both orders; labelled: a gold completion and each that was
    # sampled in its place, which takes no judge (SPIN, arXiv 2401.01335).
    pairing: str = option(
        "best_worst", choices=("best_worst", "all_pairs", "consistent", "labelled")
    )
    margin: float = option(0.0, low=0.0)  # least difference of scores, besides that there is one
    per_prompt: int = option(0, low=0)  # most pairs, those of the largest margins; 0: all
    count: int = option(0, low=0)  # most pairs of a round, those of its first prompts; 0: all
    desirable: float = option(0.5, low=0.0, high=1.0)  # kto: scores above are good, below bad


OF_PAIRS = ("dpo", "ipo", "simpo", "orpo", "reward")  # of a better and a worse text each
COMPARING = (*OF_PAIRS, "policy_gradient")  # texts of one prompt


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises (`karploop/training/objectives.py`). A warm-up is supervised."""

    # sft: imitate what was kept; dpo, ipo, simpo, orpo: prefer the better of a pair; kto: make the
    # good likelier and the bad less so; policy_gradient: make samples likelier by their advantage;
    # gkd: say what the role `teacher` says next, on the rows that sft imitates; reward: give the
    # better of a pair the larger reward, which trains no policy but a judge.
    name: str = option(
        "sft",
        choices=("sft", "gkd", "dpo", "ipo", "simpo", "orpo", "kto", "policy_gradient", "reward"),
    )
    weighting: str = option("token", choices=("token", "example"))  # sft, gkd: what counts the same
    # gkd: KL(teacher ‖ student), KL(student ‖ teacher), or the generalised Jensen–Shannon one. The
    # share of the student's own texts, λ of arXiv 2306.13649, is 1 − 'regime.seed_share'.
    divergence: str = option("forward_kl", choices=("forward_kl", "reverse_kl", "jsd"))
    temperature: float = option(1.0, low=0.01)  # gkd: that the logits of both are divided by
    beta: float = option(0.1, low=0.0)  # dpo, ipo, simpo, kto: of rewards; jsd: the teacher's part
    label_smoothing: float = option(0.0, low=0.0, high=0.5)  # dpo: how often a pair is wrong
    sft: float = option(0.0, low=0.0)  # dpo: weight of likelihood of the better one
    by_token: bool = False  # ipo: log-ratios are means over tokens
    margin: float = option(0.5, low=0.0)  # simpo: between rewards
    odds_weight: float = option(0.1, low=0.0)  # orpo
    desirable_weight: float = option(1.0, low=0.0)  # kto
    undesirable_weight: float = option(1.0, low=0.0)  # kto
    centring: float = option(0.01, low=0.0)  # reward: as of RewardConfig
    # What is not to be left (dpo, ipo, kto, policy_gradient): the base, or the round's first
    # parameters.
    reference: str = option("base", choices=("base", "round"))
    # policy_gradient. Advantages over others of the prompt, or by what the role `teacher` says of
    # each token.
    advantage: str = option("rloo", choices=("rloo", "grpo", "dr_grpo", "teacher"))
    reward: str = option("score", choices=("score", "raw"))  # raw: of a reward model, not its σ
    clip_low: float = option(0.2, low=0.0, high=1.0)  # how far a ratio may fall; 0: any far
    clip_high: float = option(0.2, low=0.0)  # … and rise
    truncate: float = option(0.0, low=0.0)  # instead: the most a ratio counts; 0: off
    aggregate: str = option("token", choices=("token", "sequence", "constant"))
    kl: float = option(0.0, low=0.0)  # coefficient of the divergence from the reference
    kl_in: str = option("loss", choices=("loss", "reward"))
    kl_estimator: str = option("k3", choices=("k2", "k3"))  # in the loss

    @property
    def taught(self) -> bool:
        """Whether the role `teacher` reads tokens for it."""
        return self.name == "gkd" or (self.name, self.advantage) == ("policy_gradient", "teacher")

    @property
    def scored(self) -> bool:
        """Whether it learns from the scores of a judge."""
        return self.name != "sft" and not self.taught


@dataclass(frozen=True)
class RegimeConfig:
    """What each round trains on and starts from, and when the loop has had enough."""

    # accumulate: the kept rows of all rounds; replace: this round's alone (arXiv 2404.01413);
    # budget: so many, drawn anew each round from those of all (arXiv 2410.16713), the labelled
    # among them where these count as any other.
    data: str = option("accumulate", choices=("accumulate", "replace", "budget"))
    budget: int = option(2048, low=1)
    # Of all draws, the share of labelled rows; 0: none where anything was kept; −1: such a row
    # counts as any other.
    seed_share: float = option(-1.0, low=-1.0, high=1.0)
    # Parameters that each round starts from; scratch: fresh ones, as a warm-up.
    start: str = option("continue", choices=("continue", "base", "scratch"))
    optimizer: str = option("reset", choices=("reset", "keep"))  # its moments from round to round
    # The loop ends after so many measured rounds in which the mean held-out score did not rise by
    # `min_gain`; 0: never.
    patience: int = option(0, low=0)
    min_gain: float = option(0.0, low=0.0)


@dataclass(frozen=True)
class ChainOptions:
    """What the chains leave open."""

    passes: int = option(1, low=0, high=16)  # critiques, each with its revision
    turns: int = option(1, low=1, high=16)  # of both sides of a debate
    precommit: bool = False  # debaters say where they stand before they hear each other
    hidden: bool = False  # debaters do not see each other's arguments
    attempts: int = option(3, low=1, high=16)  # most drafts or repairs
    constitution: str = ""  # a file with a principle a line; empty: the shipped one
    # A folder whose templates take the place of the shipped ones of their names; `short`: shipped
    # ones in few characters, for small models.
    templates: str = ""
    fields: str = "name, date, place"  # what is extracted
    judging_temperature: float = option(0.0, low=0.0)  # of critics, judges and checks


@dataclass(frozen=True)
class GenerateConfig:
    """One round's sampling: new prompts, and the curriculum that decides how hard they are."""

    # new: drawn anew each round; labelled: those of the labelled problems, without their answers.
    problems: str = option("new", choices=("new", "labelled"))
    prompts: int = option(2048, low=1)
    samples: int = option(1, low=1)  # completions a prompt
    # Difficulties of the rounds: one step further at a time; further the better the last went; all
    # up to `max_difficulty` from the first on.
    curriculum: str = option("step", choices=("step", "accelerated", "all"))
    difficulty_step: int = option(1, low=0)  # 0 keeps sampling up to the seed difficulty
    max_difficulty: int = option(0, low=0)  # where the curriculum ends; 0: nowhere
    spread: int = option(1, low=1)  # difficulties a round: the newest and those just below it
    advance: float = option(0.0, low=0.0, high=1.0)  # yield at the newest that unlocks the next
    temperature: float = option(1.0, low=0.0)  # 0: greedy
    top_k: int = option(0, low=0)  # 0: off
    top_p: float = option(1.0, low=0.0, high=1.0)  # 1: off
    min_p: float = option(0.0, low=0.0, high=1.0)  # 0: off
    batch: int = option(256, low=1)  # prompts a device call; also what a kill can lose
    # Prompts that are decoded at a time: as one is done, the next begins; 0: the whole batch.
    slots: int = option(0, low=0)
    fused_steps: int = option(4, low=1)  # decode steps between looks at which rows have stopped
    # What keys and values are stored in: what the model computes in, or less.
    cache: str = option("model", choices=("model", "bfloat16", "int8"))
    # What matrices are stored in while sampling; int8 pays on accelerators, and not on a CPU.
    weights: str = option("model", choices=("model", "int8"))
    # Where completions come from: a shipped chain, or "package.module:ATTRIBUTE"; empty: the model
    chain: str = ""
    options: ChainOptions = ChainOptions()
    # Prompts without a right completion are sampled again with the gold answer as a hint; what is
    # right then is learnt without the hint (arXiv 2203.14465). The generator sees gold.
    rationalise: bool = False


# Judges that read gold answers or votes; those that ask a model, people, one another, or nobody.
TALLIES = ("verifier", "vote")
SIMULATED = "simulated_annotators"  # in the place of people, from gold answers
MODELS = (
    *("rubric", "pairwise", "constitution", "debate"),
    *("reward", "person", SIMULATED, "random", "ensemble"),
)
GOLD = ("verifier", SIMULATED)  # those that see gold answers
RANKINGS = ("round_robin", "bradley_terry", "tournament")


@dataclass(frozen=True)
class JudgeConfig:
    """Who says how good a completion is, and how."""

    # Empty: the judge that the filter reads. Filters of scores read any of them.
    name: str = option("", choices=("", *TALLIES, *MODELS))
    role: str = "judge"  # who is asked, a name in `config.roles`; of an ensemble, each member's own
    voters: str = option("samples", choices=("samples", "members"))  # vote: who is counted
    # vote: answers are the same as the task writes them (in a file: letter by letter), or as
    # mathematics (1/2 and 0.5), by the package math-verify.
    equivalence: str = option("task", choices=("task", "math"))
    templates: str = ""  # a folder of them, as in `ChainOptions`
    criteria: str = ""  # rubric: a file with "weight name: question" a line; empty: the shipped one
    levels: int = option(5, low=2, high=9)  # rubric: of a rating, 1 … this
    constitution: str = ""  # a file with a principle a line; empty: the shipped one
    # constitution: those that a pair is judged by, drawn for each and averaged.
    principles: int = option(1, low=1)
    turns: int = option(1, low=1, high=16)  # debate: of both sides
    # pairwise, constitution: how comparisons of two become scores of n.
    ranking: str = option("round_robin", choices=RANKINGS)
    # person: a file with verdicts. In a loop, what it lacks is written to it, and the run waits.
    review: str = ""
    # person, simulated_annotators: whether single replies are rated, good or bad, or two of a
    # prompt compared.
    people: str = option("rate", choices=("rate", "compare"))
    annotators: int = option(1, low=1)  # simulated_annotators: who look at each reply or pair
    # simulated_annotators: how often each of them says the contrary of what is so.
    error: float = option(0.0, low=0.0, high=1.0)
    members: str = ""  # ensemble: judges, as in rubric, debate@large*0.5, vote (a role, a weight)
    combine: str = option("mean", choices=("mean", "min", "vote"))  # ensemble
    # ensemble: members weigh by their measured accuracy, in a calibration.json of
    # experiments.calibrate; empty: by the weights in `members`.
    calibration: str = ""
    rationale: bool = False  # the judge writes its reasons first, and its answer is read from them
    clamp: float = option(0.4, low=0.0, high=0.5)  # constitution, after reasons: least preference
    max_new_tokens: int = option(256, low=1)  # of reasons and arguments
    batch: int = option(8, low=1)  # prompts of judges and chains on the device at a time
    # Each round, on labelled problems: a judge that is no better than chance, or right less often
    # than the policy, is not measured, said to be so, or ends the loop.
    fitness: str = option("warn", choices=("off", "warn", "stop"))
    fitness_problems: int = option(32, low=1)  # at most


@dataclass(frozen=True)
class FilterConfig:
    """Which samples become training rows."""

    # A registered filter, "package.module:ATTRIBUTE", or several of them as one: chain(a, b), each
    # of which sees what the former kept, or all_of(a, b), all of which must keep a row.
    name: str = "verifier"
    agreement: float = option(0.8, low=0.0, high=1.0)  # vote: least share of voters that agree
    votes: int = option(0, low=0)  # vote: least number of them, in place of the share; 0: the share
    slack: int = option(1, low=0)  # length: characters a completion may lack to the batch's longest
    # random, quantile, diverse: share of the samples that is kept, without `count` or `match`.
    rate: float = option(0.5, low=0.0, high=1.0)
    # random, quantile, diverse, oracle: rows kept; -1: the share, of oracle one row a prompt.
    count: int = option(-1, low=-1)
    # random, quantile, diverse, oracle: keep as many rows as this other filter would.
    match: str = ""
    threshold: float = option(0.5, low=0.0, high=1.0)  # threshold: least score in round 0 …
    threshold_step: float = option(0.0, low=0.0, high=1.0)  # … what it rises by each round …
    threshold_last: float = option(1.0, low=0.0, high=1.0)  # … and where that ends
    margin: float = option(0.1, low=0.0, high=1.0)  # margin: least lead over the runner-up's score
    cap: int = option(1, low=1)  # cap, top_k: most rows of a prompt
    # duplicates, near_duplicates, diverse: whose completions are compared, a prompt's or all.
    among: str = option("prompt", choices=("prompt", "all"))
    # near_duplicates, diverse: what texts are cut into, and how many of them make one piece.
    shingle: str = option("characters", choices=("characters", "words"))
    shingle_size: int = option(3, low=1, high=64)
    similarity: float = option(0.8, low=0.1, high=1.0)  # near_duplicates: of pieces, least Jaccard
    # perplexity: bounds on the mean negative log-probability a token, as a quantile or in nats.
    nll_low: float = option(0.0, low=0.0)
    nll_high: float = option(0.9, low=0.0)
    nll_by: str = option("quantile", choices=("quantile", "nats"))
    pattern: str = r"\s*-?\d+\s*"  # parses: regular expression that the whole completion matches
    allow_gold: bool = False  # oracle: gold labels may select, for a diagnostic, marked as such
    # What a missing verdict does: the row is dropped, or the run stops.
    missing: str = option("drop", choices=("drop", "stop"))
    # When nothing is kept: end the loop, go on to the next round, or train on the earlier data.
    on_empty: str = option("stop", choices=("stop", "skip", "train"))


@dataclass(frozen=True)
class NoiseConfig:
    """Wrong labels put in on purpose, for ablations; off at rate 0."""

    rate: float = option(0.0, low=0.0, high=1.0)  # share of the kept rows
    structure: str = option("digit", choices=("digit", "random", "swap", "drop"))
    first_round: int = option(0, low=0)  # rounds first_round … last_round are noisy
    last_round: int = option(1_000_000, low=0)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurement, by difficulty."""

    # Rounds from one measurement to the next; the base and the last round are always measured.
    every: int = option(1, low=1)
    problems: int = option(128, low=1)  # at most, for each difficulty
    samples: int = option(0, low=0)  # a problem, for pass@1 and pass@samples; 0: greedy alone
    temperature: float = option(1.0, low=0.0)  # of those samples
    difficulties: tuple[int, ...] = option((1, 2, 3, 4, 5, 6, 7, 8, 9, 10), low=1)
    batch: int = option(256, low=1)


@dataclass(frozen=True)
class RetentionConfig:
    """What `experiments.gc` keeps of a finished run's large files."""

    last: int = option(2, low=1)  # newest rounds whose parameters stay
    best: int = option(1, low=0)  # rounds with the best mean held-out score whose parameters stay


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    seed: int = option(0, low=0, high=2**31 - 1)
    rounds: int = option(5, low=0)
    members: int = option(1, low=1)  # independently seeded models; votes may be taken over them
    task: TaskConfig = TaskConfig()
    # Named models: policy, those that a judge or a chain asks (judge, debater, critic), which are
    # else the policy, and the teacher of an objective, or of the chain `teacher`.
    roles: dict[str, RoleConfig] = dataclasses.field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    mesh: MeshConfig = MeshConfig()
    warmup: TrainConfig = TrainConfig(steps=3000)
    generate: GenerateConfig = GenerateConfig()
    judge: JudgeConfig = JudgeConfig()
    filter: FilterConfig = FilterConfig()
    noise: NoiseConfig = NoiseConfig()
    preference: PreferenceConfig = PreferenceConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    regime: RegimeConfig = RegimeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    retention: RetentionConfig = RetentionConfig()
    # Other settings from a round on (`karploop/phases.py`), by that round's number: in a file
    # {"2": {"objective": {"name": "dpo"}}}, and --config.phases.2.objective.name=dpo.
    phases: dict[str, dict] = dataclasses.field(default_factory=dict)

    @property
    def policy(self) -> RoleConfig:
        """The role that is trained."""
        return self.roles.get("policy", RoleConfig())


@dataclass(frozen=True)
class ChainConfig:
    """A chain over the rows of a file."""

    chain: str = "answer"  # a shipped chain, or "package.module:ATTRIBUTE"
    seed: int = option(0, low=0, high=2**31 - 1)
    roles: dict[str, RoleConfig] = dataclasses.field(default_factory=dict)
    options: ChainOptions = ChainOptions()
    temperature: float = option(1.0, low=0.0)
    top_p: float = option(1.0, low=0.0, high=1.0)
    max_new_tokens: int = option(256, low=1)  # of every step
    rows: int = option(256, low=1)  # that go through the steps together
    batch: int = option(8, low=1)  # prompts on the device at a time
    dtype: str = option("float32", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class JudgingConfig:
    """A judge over the rows of a file."""

    seed: int = option(0, low=0, high=2**31 - 1)
    roles: dict[str, RoleConfig] = dataclasses.field(default_factory=dict)
    judge: JudgeConfig = JudgeConfig(name="rubric")
    rows: int = option(256, low=1)  # that are judged together
    dtype: str = option("float32", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class TuningConfig:
    """How a reward model learns with more than its head."""

    epochs: int = option(1, low=1)  # how often it sees each comparison
    rows: int = option(8, low=1)  # packed rows a step
    # Tokens a row; comparisons with a longer text are not used.
    row_length: int = option(512, low=4)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4)
    lora: LoraConfig = LoraConfig(rank=16)  # tune=lora


@dataclass(frozen=True)
class RewardConfig:
    """A reward model from the comparisons of a file."""

    seed: int = option(0, low=0, high=2**31 - 1)  # another one holds out other prompts
    roles: dict[str, RoleConfig] = dataclasses.field(default_factory=dict)  # `base`, a checkpoint
    held_out: float = option(0.1, low=0.0, high=0.9)  # share of the prompts, never trained on
    # What counts the same: each prompt, however many comparisons it has, or each comparison.
    equal: str = option("prompts", choices=("prompts", "comparisons"))
    centring: float = option(0.01, low=0.0)  # of (chosen + rejected)², which holds rewards near 0
    # What learns: a head on the frozen checkpoint, an adapter with it, or all parameters.
    tune: str = option("head", choices=("head", "lora", "full"))
    # head: at 1, by the prior, rewards have a standard deviation of 1.
    l2: float = option(1.0, low=0.0)
    steps: int = option(500, low=1)  # head: of gradient descent
    train: TuningConfig = TuningConfig()  # lora, full
    batch: int = option(8, low=1)  # replies on the device at a time
    dtype: str = option("float32", choices=("float32", "bfloat16"))


# Keys that never change a result: a run may go on with other values of these.
RESULT_FREE = ("mesh", "retention", "rounds")

TEACHER = "teacher"  # the role, and the chain that asks it alone

# Keys of a role that say how its endpoint is asked and paid, and nothing of what it says.
ASKING = (
    *("key_env", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout"),
    *("attempts", "input_price", "output_price", "cap"),
)


def changes_results(path: str) -> bool:
    """Whether a run with another value of the key at this dotted path is another run."""
    group, name = path.partition(".")[0], path.rpartition(".")[2]
    return group not in RESULT_FREE and not (group == "roles" and name in ASKING)
