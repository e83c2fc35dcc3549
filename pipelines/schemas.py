"""Every table of the lake: columns, Arrow types, keys and meanings, said once.

The lake's DDL, the key checks and `docs/lake.md` are generated from here. No SQL and no I/O: the
views are in `views.py`, reading and publishing in `lake.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

UUID = pa.uuid()
TEXT = pa.string()
INT = pa.int32()
LONG = pa.int64()
REAL = pa.float32()
DOUBLE = pa.float64()
BOOL = pa.bool_()
TIME = pa.timestamp("us", tz="UTC")
TEXTS = pa.list_(TEXT)
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
CANDIDATES = pa.list_(
    pa.struct([("trajectory_id", UUID), ("rank", INT), ("policy_id", UUID), ("relation", TEXT)])
)

# Values of the categorical columns.
POLICY_KINDS = ("base", "chat", "checkpoint", "api", "recorded")
PROMPT_KINDS = ("prefix", "instruction")
SIDES = ("train", "test")  # of a prompt group or a policy group
CELLS = ("seen", "new_policy", "new_prompt", "both_new")
SPLITS = ("train", "eval")  # of pairs, groups and preferences
LABELS = ("same_policy", "cross_policy", "ambiguous")
RELATIONS = ("same", "sibling", "same_family", "other_family")
SCOPES = ("prompt", "corpus")
FLAGS = (
    "empty",
    "loop",
    "truncated",
    "control_characters",
    "replacement_character",
    "refusal",
    "other_language",
)


def cell_of(prompt_side: str, policy_side: str) -> str:
    """The evaluation cell of a prompt's side and its policies' common side."""
    return {
        ("train", "train"): "seen",
        ("train", "test"): "new_policy",
        ("test", "train"): "new_prompt",
        ("test", "test"): "both_new",
    }[prompt_side, policy_side]


@dataclass(frozen=True)
class Column:
    """One column: name, Arrow type, meaning, and whether a value may be missing."""

    name: str
    type: pa.DataType
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """One table: its key is unique, and `order` is how its files are sorted for the questions.

    `row_group` is how many rows a reader of one of them has to unpack, where rows are long.
    """

    name: str
    key: tuple[str, ...]
    meaning: str
    columns: tuple[Column, ...]
    order: tuple[str, ...] = ()
    row_group: int | None = None

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema that every publish to this table must have."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])


def _c(name: str, kind: pa.DataType, meaning: str) -> Column:
    return Column(name, kind, meaning)


def _opt(name: str, kind: pa.DataType, meaning: str) -> Column:
    return Column(name, kind, meaning, nullable=True)


POLICIES = Table(
    "policies",
    ("policy_id",),
    "Who answers: fixed weights (or an endpoint with a revision) and a template.",
    (
        _c("policy_id", UUID, "fingerprint of weights or revision and template"),
        _c("name", TEXT, "as the pool file or the source names it; unique within a source"),
        _c("policy_group", TEXT, "related policies share it; the unit of splitting"),
        _c("family", TEXT, "wider kinship than policy_group, for the relation of pairs"),
        _c("kind", TEXT, "base, chat, checkpoint, api or recorded"),
        _opt("parent", UUID, "policy it was trained on from"),
        _opt("lineage_step", LONG, "training step within its run; siblings differ in it"),
        _c("source", TEXT, "where it comes from: embedded, a data source, a hub, a vendor"),
        _opt("revision", TEXT, "weights hash or hub revision"),
        _opt("template", TEXT, "how a prompt becomes the model's input"),
        _c("engine", TEXT, "local, recorded, vllm or openai"),
        _opt("licence", TEXT, "of the weights or of the recorded answers"),
        _c("split", TEXT, "side of its policy_group: train or test"),
    ),
    ("source", "name"),
)

PROMPTS = Table(
    "prompts",
    ("prompt_id",),
    "What is asked: a document prefix or an instruction.",
    (
        _c("prompt_id", UUID, "hash of source and source_key"),
        _c("source_key", TEXT, "the prompt's name within its source"),
        _c("text", TEXT, "the prompt as plain text (the user turn)"),
        _opt("messages", MESSAGES, "all turns, where there are several"),
        _c("kind", TEXT, "prefix (to be continued) or instruction"),
        _c("source", TEXT, "collection it comes from"),
        _opt("origin", TEXT, "file and row that it was drawn from"),
        _opt("category", TEXT, "topic or task"),
        _c("prompt_group", TEXT, "equal and near-equal prompts share it; the unit of splitting"),
        _opt("reference", TEXT, "gold answer or reference text"),
        _c("split", TEXT, "side of its prompt_group: train or test"),
        _opt("licence", TEXT, "of the prompt"),
    ),
    ("source", "prompt_id"),
)

TRAJECTORIES = Table(
    "trajectories",
    ("trajectory_id",),
    "One answer, with all that is needed to make it again. The only table that holds its text.",
    (
        _c("trajectory_id", UUID, "hash of policy_id, prompt_id, sampling_id, sample_index"),
        _c("prompt_id", UUID, "the prompt"),
        _c("policy_id", UUID, "the policy"),
        _c("sampling_id", UUID, "hash of the sampling values"),
        _opt("sampling", TEXT, "name of the decoding where the source gives one"),
        _opt("temperature", REAL, "softmax temperature; 0 is greedy"),
        _opt("top_p", REAL, "nucleus mass, 0..1"),
        _opt("top_k", INT, "candidates kept; 0 keeps all"),
        _opt("max_tokens", INT, "limit of new tokens"),
        _c("sample_index", INT, "0-based number of the sample"),
        _c("text", TEXT, "the answer"),
        _opt("finish_reason", TEXT, "stop or length, where known"),
        _opt("tokens", INT, "tokens of the answer as made"),
        _c("original_length", INT, "characters before any cut"),
        _opt("cut", TEXT, "loop or sentence, when the text was shortened for that"),
        _opt("seed", LONG, "seed of its generator, 63 bits; null for recorded answers"),
        _c("engine", TEXT, "what made it"),
        _opt("engine_version", TEXT, "version of that"),
        _c("content_hash", UUID, "hash of the text"),
        _c("flags", TEXTS, "quality flags: " + ", ".join(FLAGS)),
        _opt("correct", BOOL, "exact check against the gold answer, where there is one"),
        _opt("licence", TEXT, "of the answer"),
        _c("created_at", TIME, "when it was made or ingested"),
    ),
    ("prompt_id", "policy_id", "sample_index"),
    row_group=8192,
)

DUPLICATES = Table(
    "duplicates",
    ("trajectory_id", "scope"),
    "Trajectories that are equal or near-equal to others; one row per member of a cluster.",
    (
        _c("trajectory_id", UUID, "the member"),
        _c("scope", TEXT, "prompt (answers to one prompt) or corpus (all answers)"),
        _c("cluster_id", UUID, "smallest trajectory_id of the cluster"),
        _c("kind", TEXT, "exact when all members have one text, else near"),
        _c("size", INT, "members of the cluster"),
        _c("representative", BOOL, "whether this member is the smallest"),
    ),
    ("scope", "cluster_id", "trajectory_id"),
)

PAIRS = Table(
    "pairs",
    ("trajectory_a", "trajectory_b"),
    "Two trajectories of one prompt with a label; unordered, so trajectory_a < trajectory_b.",
    (
        _c("trajectory_a", UUID, "the smaller id"),
        _c("trajectory_b", UUID, "the larger id"),
        _c("prompt_id", UUID, "their prompt"),
        _c("label", TEXT, "same_policy, cross_policy or ambiguous"),
        _opt("reason", TEXT, "why it is ambiguous: exact, near, empty or related"),
        _c("relation", TEXT, "same, sibling, same_family or other_family"),
        _c("same_sampling", BOOL, "whether both were decoded alike"),
        _c("similarity", REAL, "MinHash estimate of their shingles' Jaccard, 0..1"),
        _c("length_ratio", REAL, "shorter by longer in characters, 0..1"),
        _c("split", TEXT, "train where prompt and policies are on the train side, else eval"),
        _c("cell", TEXT, "seen, new_policy, new_prompt or both_new"),
    ),
    ("prompt_id", "trajectory_a", "trajectory_b"),
)

PAIR_SUMS = Table(
    "pair_sums",
    ("source", "policy_a", "policy_b", "cell", "label", "reason", "relation"),
    "Pairs summed by their two policies: written with the pairs, and read instead of them.",
    (
        _c("source", TEXT, "source of the prompts"),
        _c("policy_a", UUID, "the smaller id of the two policies"),
        _c("policy_b", UUID, "the larger id, or the same"),
        _c("split", TEXT, "train or eval"),
        _c("cell", TEXT, "seen, new_policy, new_prompt or both_new"),
        _c("label", TEXT, "same_policy, cross_policy or ambiguous"),
        _c("reason", TEXT, "why ambiguous: exact, near, empty or related; else empty"),
        _c("relation", TEXT, "same, sibling, same_family or other_family"),
        _c("pairs", LONG, "how many"),
        _c("mean_similarity", DOUBLE, "mean estimated Jaccard of the two answers"),
        _c("mean_length_ratio", DOUBLE, "mean of the shorter length by the longer"),
    ),
    ("source", "policy_a", "policy_b"),
)

ANSWER_SUMS = Table(
    "answer_sums",
    ("policy_id",),
    "Answers summed by their policy: kept by every publish, and read instead of them.",
    (
        _c("policy_id", UUID, "the policy"),
        _c("prompts", LONG, "prompts that it answered"),
        _c("trajectories", LONG, "answers"),
        _c("characters", LONG, "of all answers, before any cut"),
        _c("tokens", LONG, "of all answers whose tokens are known"),
        _c("counted", LONG, "answers whose tokens are known"),
        _c("empty", LONG, "answers flagged empty"),
        _c("loop", LONG, "flagged loop"),
        _c("truncated", LONG, "flagged truncated"),
        _c("refusal", LONG, "flagged refusal"),
        _c("other_language", LONG, "flagged other_language"),
        _c("repeated", LONG, "answers in a duplicate cluster within their prompt"),
        _c("correct", LONG, "answers found correct"),
        _c("checked", LONG, "answers that could be checked"),
    ),
    ("policy_id",),
)

PROMPT_SUMS = Table(
    "prompt_sums",
    ("prompt_id", "cell", "label"),
    "Pairs summed by their prompt: kept by every publish, and read instead of them.",
    (
        _c("prompt_id", UUID, "the prompt"),
        _c("cell", TEXT, "seen, new_policy, new_prompt or both_new"),
        _c("label", TEXT, "same_policy, cross_policy or ambiguous"),
        _c("pairs", LONG, "how many"),
    ),
    ("prompt_id",),
)

GROUPS = Table(
    "groups",
    ("group_id",),
    "One reference and K candidates: what a training run or an evaluation reads.",
    (
        _c("group_id", UUID, "hash of wrapper, reference and candidates"),
        _c("prompt_id", UUID, "the prompt"),
        _c("reference", UUID, "trajectory that candidates are compared with"),
        _c("candidates", CANDIDATES, "rank 0 is best; relation is to the reference's policy"),
        _c("wrapper", TEXT, "pretrain (policy groups) or sft (preference groups)"),
        _opt("category", TEXT, "category of the prompt or preference"),
        _c("split", TEXT, "train or eval"),
        _c("cell", TEXT, "seen, new_policy, new_prompt or both_new"),
        _c("snapshot", LONG, "lake snapshot that it was made from"),
    ),
    ("wrapper", "split", "cell", "group_id"),
)

PREFERENCES = Table(
    "preferences",
    ("preference_id",),
    "A judgement between two answers, with a reference where there is one.",
    (
        _c("preference_id", UUID, "hash of reference, chosen, rejected and annotator"),
        _c("prompt_id", UUID, "the prompt"),
        _opt("reference", UUID, "trajectory of the reference answer"),
        _c("chosen", UUID, "trajectory of the better answer"),
        _c("rejected", UUID, "trajectory of the worse answer"),
        _c("annotator", TEXT, "who judged"),
        _c("annotator_type", TEXT, "human, llm or verifier"),
        _opt("category", TEXT, "topic or task"),
        _opt("strength", REAL, "how clear the judgement was, in the source's unit"),
        _c("split", TEXT, "train where the prompt is on the train side, else eval"),
    ),
    ("prompt_id",),
)

CHECKPOINTS = Table(
    "checkpoints",
    ("checkpoint_id",),
    "Reward models and backbones that were trained.",
    (
        _c("checkpoint_id", UUID, "hash of stage, parent, snapshot and configuration"),
        _c("name", TEXT, "asset that made it"),
        _c("stage", TEXT, "language_model, pretrain or finetune"),
        _opt("parent", UUID, "checkpoint it started from"),
        _opt("snapshot", LONG, "lake snapshot whose groups it read"),
        _c("configuration", TEXT, "JSON of its settings"),
        _c("path", TEXT, "folder, relative to POLAR_HOME"),
        _c("metrics", TEXT, "JSON of its last metrics"),
        _opt("git_revision", TEXT, "code that trained it"),
        _c("created_at", TIME, "when it was saved"),
    ),
    ("created_at",),
)

EVALUATIONS = Table(
    "evaluations",
    ("checkpoint_id", "suite", "cell", "category", "metric", "scorer"),
    "Every measured number with its interval; rulers are scorers beside the model.",
    (
        _c("checkpoint_id", UUID, "the checkpoint measured"),
        _c("suite", TEXT, "policy_discrimination, preference or scaling"),
        _c("cell", TEXT, "seen, new_policy, new_prompt, both_new or all"),
        _c("category", TEXT, "category, relation (siblings) or all"),
        _c("metric", TEXT, "accuracy, difference (model less ruler, paired) or, of scaling, loss"),
        _c("scorer", TEXT, "model, length, tfidf, shuffled_reference, reference_blind, ..."),
        _c("value", DOUBLE, "the number, ties counted one half"),
        _opt("low", DOUBLE, "lower end of the clustered 95 % interval"),
        _opt("high", DOUBLE, "upper end"),
        _c("n", LONG, "comparisons"),
        _c("clusters", LONG, "prompt groups (the smaller of the two ways) resampled"),
        _c("interval", TEXT, "what it resamples: two_way, prompt_groups, policy_groups or wilson"),
        _opt("snapshot", LONG, "lake snapshot evaluated on"),
        _c("created_at", TIME, "when"),
    ),
    ("checkpoint_id", "suite"),
)

COUNTS = Table(
    "counts",
    ("source", "stage", "what", "label", "reason", "split"),
    "Rows in and out of each stage and each reason for which one was kept out.",
    (
        _c("source", TEXT, "prompt source, or all"),
        _c("stage", TEXT, "ingest, rollouts, dedup, pairs, groups or preferences"),
        _c("what", TEXT, "in, out, excluded or quarantined"),
        _c("label", TEXT, "pair label, or empty"),
        _c("reason", TEXT, "why, or empty"),
        _c("split", TEXT, "split or cell, or empty"),
        _c("rows", LONG, "how many"),
    ),
    ("source", "stage"),
)

QUARANTINE = Table(
    "quarantine",
    ("file", "row"),
    "Rows kept out: bad ones, and prompts that evaluation sets know. The others went on.",
    (
        _c("file", TEXT, "input file name"),
        _c("row", LONG, "1-based line (JSONL) or row (Parquet)"),
        _opt("field", TEXT, "field at fault"),
        _c("problem", TEXT, "what is wrong and what to do"),
        _opt("excerpt", TEXT, "the first 200 characters of the row"),
        _c("created_at", TIME, "when it was met"),
    ),
    ("file", "row"),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        POLICIES,
        PROMPTS,
        TRAJECTORIES,
        DUPLICATES,
        ANSWER_SUMS,
        PAIRS,
        PAIR_SUMS,
        PROMPT_SUMS,
        GROUPS,
        PREFERENCES,
        CHECKPOINTS,
        EVALUATIONS,
        COUNTS,
        QUARANTINE,
    )
}
