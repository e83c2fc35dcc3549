"""Prompts drawn from files: beginnings of documents, and instructions; seeded, grouped, clean.

What is drawn follows from texts and the seed alone, never from the order of rows or the names of
files: a file's `limit` keeps the rows of smallest hash, and the length of a document's beginning is
hashed from it. What was drawn before stays before what is new, so that more rows never unmake a
prompt and its answers. Files are read in `prompt_files.py`; what evaluation sets know is found in
`decontamination.py`.

Every row is accounted for: drawn, excluded with its reason (over the limit, repeated, too short,
contaminated, between sides), or quarantined as bad.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines import decontamination, ids, prompts
from pipelines.decontamination import Known
from pipelines.engines.recorded.columns import empty
from pipelines.engines.recorded.ledger import Batch, Ledger
from pipelines.errors import BadInputError
from pipelines.prompt_files import BadRow, asked, count_rows, find_files, read_rows
from pipelines.prompt_settings import PromptFile, PromptSources

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[int, int, str], None]

CHARACTERS_PER_TOKEN = 32  # of a document's beginning that is tokenised: more than any text needs


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Rows of the tables `prompts`, `counts` and `quarantine`."""

    prompts: pa.Table
    counts: pa.Table
    quarantine: pa.Table


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where names in the settings are looked for: beside the configuration, in policies/."""

    base: Path
    policies: Path


@dataclass(kw_only=True)
class _Candidate:
    """A row that may become a prompt."""

    file: PromptFile
    place: tuple[str, int]  # file as the quarantine names it, and row
    source_key: str  # its collection and all that is asked, wherever its row is
    text: str
    more: dict[str, Any]
    system: str | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """What tells it from other prompts."""
        return (self.text, self.system) if self.system else (self.text,)


def draw_prompts(
    settings: PromptSources,
    source: str,
    split: prompts.SplitSettings,
    places: Places,
    groups: Mapping[bytes, str] | None = None,
    progress: Progress | None = None,
) -> Drawn:
    """Draw the prompts of all files.

    Args:
        settings: the section `prompt_sources`.
        source: of the pool, which all its prompts carry.
        split: which prompt groups are held out.
        places: where files and tokenizers are.
        groups: prompt_group by prompt_id of prompts that were drawn before; they are drawn first
            and keep theirs, so that no prompt ever changes sides. A new one that is near to both
            sides is kept out.
        progress: called with (files done, files, note).

    Raises:
        BadInputError: a file, an evaluation set or the tokenizer cannot be read at all.
    """
    book = Ledger()
    paths = {file.name: find_files(file.path, places.base) for file in settings.files}
    total, done = sum(map(len, paths.values())), 0
    known = list(_evaluation_texts(settings, places.base))
    candidates: list[_Candidate] = []
    for file in settings.files:
        found = _candidates(file, paths[file.name], settings, source, groups or {}, book)
        done += len(paths[file.name])
        if progress:
            progress(done, total, f"read {file.name}")
        if file.kind == "documents":
            found = _beginnings(found, settings, places, source, book)
        candidates += found
    candidates = _distinct(candidates, source, book)
    texts = [candidate.text for candidate in candidates]
    every = [*texts, *(one.text for one in known)]
    if progress:
        progress(total, total, f"{len(texts):,} prompts, {len(known):,} known texts")
    smallest = decontamination.near_groups(every, settings.near)
    reasons = _contaminated(texts, known, smallest, settings)
    kept = []
    for number, candidate in enumerate(candidates):
        if number in reasons:
            _keep_out(book, source, candidate, "contaminated", reasons[number])
        else:
            kept.append((candidate, int(smallest[number])))
    rows = list(_grouped(kept, source, split, groups or {}, book))
    for candidate, _ in rows:
        book.count("out", candidate.file.name, source)
    book.check()
    return Drawn(
        prompts=prompts.prompts_table([row for _, row in rows], split),
        counts=book.counts(),
        quarantine=book.quarantine(datetime.now(UTC)),
    )


def planned(settings: PromptSources, base: Path) -> dict[str, int]:
    """At most so many prompts of each kind, from limits and numbers of rows."""
    kinds = {"documents": "prefix", "instructions": "instruction"}
    total: Counter[str] = Counter()
    for file in settings.files:
        rows = sum(count_rows(path) for path in find_files(file.path, base))
        total[kinds[file.kind]] += min(rows, file.limit or rows)
    return dict(total)


def stamp(settings: PromptSources, base: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files read, to tell whether they changed."""
    paths = [file.path for file in settings.files] + [one.path for one in settings.evaluation]
    found = [path for given in paths for path in find_files(given, base)]
    return [(path.name, (at := path.stat()).st_size, at.st_mtime_ns) for path in found]


LISTED = "prompts of "
"""How the file names of all pools' rows in `quarantine` begin."""


def label_prefix(source: str) -> str:
    """How the file names of a source's rows in `quarantine` begin."""
    return f"{LISTED}{source}: "


def _batch(file: PromptFile, name: str) -> Batch:
    return Batch(file.name, name, empty("prompts"))


def _candidates(
    file: PromptFile,
    paths: list[Path],
    settings: PromptSources,
    source: str,
    before: Container[bytes],
    book: Ledger,
) -> list[_Candidate]:
    """The usable rows drawn `before`, then those of smallest hash, in the order of hashes."""
    drawn: list[tuple[int, int, _Candidate]] = []  # a heap whose head is the largest hash
    seen: set[bytes] = set()
    serial = 0
    for path in paths:
        name = f"{label_prefix(source)}{file.name}/{path.name}"
        batch = _batch(file, name)
        for number, row in read_rows(path, settings.max_characters):
            book.count("in", file.name, source)
            try:
                candidate = _candidate(file, (name, number), row)
            except BadRow as bad:
                raw = bad.raw or repr(row)
                book.bad(
                    batch, source, number, reason=bad.reason, field=bad.field,
                    problem=str(bad), raw=raw,
                )  # fmt: skip
                continue
            key = ids.content_id("draw", settings.seed, *candidate.asked)
            if key in seen:
                book.count("excluded", file.name, source, "repeated")
                continue
            seen.add(key)
            if file.kind == "documents":
                most = settings.prefix_tokens[1] * CHARACTERS_PER_TOKEN
                candidate.text = candidate.text[:most]
                candidate.more["draw"] = int.from_bytes(key[8:], "big")
            serial += 1
            old = prompts.prompt_id(source, candidate.source_key) in before
            entry = (-int.from_bytes(key, "big") - (not old) * 2**128, serial, candidate)
            if file.limit is None or len(drawn) < file.limit:
                heapq.heappush(drawn, entry)
            else:
                heapq.heappushpop(drawn, entry)
                book.count("excluded", file.name, source, "limit")
    return [candidate for _, _, candidate in sorted(drawn, key=lambda entry: -entry[0])]


def _candidate(
    file: PromptFile, place: tuple[str, int], row: dict[str, Any] | BadRow
) -> _Candidate:
    if isinstance(row, BadRow):
        raise row
    column = file.column or ("text" if file.kind == "documents" else None)
    found = asked(row, column)
    category = row.get(file.category) if file.category else None
    more: dict[str, Any] = {"category": str(category) if category is not None else file.name}
    if file.kind == "instructions":
        more["reference"] = found.reference
        if found.system:
            turns = (("system", found.system), ("user", found.text))
            more["messages"] = [{"role": role, "content": said} for role, said in turns]
    made = _Candidate(
        file=file, place=place, source_key="", text=found.text, more=more, system=found.system
    )
    made.source_key = f"{file.name}/{ids.content_id('text', *made.asked).hex()}"
    return made


def _beginnings(
    found: list[_Candidate], settings: PromptSources, places: Places, source: str, book: Ledger
) -> list[_Candidate]:
    """Cut each document to a beginning of hashed length that leaves something to continue."""
    low, high = settings.prefix_tokens
    tokenizer = load_tokenizer(settings.tokenizer or "", places)
    kept = []
    for at in range(0, len(found), 256):
        part = found[at : at + 256]
        encoded = tokenizer.encode_batch(
            [candidate.text for candidate in part], add_special_tokens=False
        )
        for candidate, tokens in zip(part, encoded, strict=True):
            most = min(high, len(tokens.offsets) - 1)
            if most < low:
                book.count("excluded", candidate.file.name, source, "too_short")
                continue
            length = low + candidate.more.pop("draw") % (most - low + 1)
            text = candidate.text[: tokens.offsets[length - 1][1]]
            if not text.strip():
                book.count("excluded", candidate.file.name, source, "blank")
                continue
            candidate.text = text
            kept.append(candidate)
    return kept


def load_tokenizer(name: str, places: Places) -> Tokenizer:
    """The tokenizer that a folder (beside the configuration, or under policies/) or a hub has.

    Raises:
        BadInputError: there is none of that name.
    """
    import huggingface_hub
    from tokenizers import Tokenizer

    for folder in (places.base / name, places.policies / name):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        return Tokenizer.from_file(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # of the hub's client, of many kinds
        msg = (
            f"prompt_sources.tokenizer: no {name}/tokenizer.json beside the configuration or under "
            f"{places.policies}, and no hub has it ({str(error).splitlines()[0]:.120})"
        )
        raise BadInputError(msg) from error


def _distinct(candidates: list[_Candidate], source: str, book: Ledger) -> list[_Candidate]:
    """Each once; a beginning of one word may be that of many documents."""
    first: dict[tuple[str, ...], _Candidate] = {}
    for candidate in candidates:
        if first.setdefault(candidate.asked, candidate) is not candidate:
            book.count("excluded", candidate.file.name, source, "repeated")
    return list(first.values())


def _evaluation_texts(settings: PromptSources, base: Path) -> Iterator[Known]:
    for one in settings.evaluation:
        usable, problem = 0, "it is empty"
        for path in find_files(one.path, base):
            for number, row in read_rows(path, settings.max_characters):
                place = f"{one.name} ({path.name}, row {number})"
                for column in one.columns or (None,):
                    try:
                        yield Known(_candidate_text(row, column), place)
                        usable += 1
                    except BadRow as bad:
                        problem = str(bad)
        if not usable:
            msg = f"evaluation set {one.name!r} has no usable row: {problem}"
            raise BadInputError(msg)


def _candidate_text(row: dict[str, Any] | BadRow, column: str | None) -> str:
    if isinstance(row, BadRow):
        raise row
    return asked(row, column).text


def _contaminated(
    texts: list[str], known: list[Known], smallest: Any, settings: PromptSources
) -> dict[int, str]:
    """Why prompts are kept out, by their index."""
    reasons = decontamination.shared_runs(texts, known, settings.shared_words)
    first: dict[int, str] = {}
    for number, one in enumerate(known):
        first.setdefault(int(smallest[len(texts) + number]), one.place)
    for number in range(len(texts)):
        if (cluster := int(smallest[number])) in first:
            reasons.setdefault(number, f"equal or near-equal to {first[cluster]}")
    return reasons


def _grouped(
    kept: list[tuple[_Candidate, int]],
    source: str,
    split: prompts.SplitSettings,
    groups: Mapping[bytes, str],
    book: Ledger,
) -> Iterator[tuple[_Candidate, dict[str, Any]]]:
    """Prompts with their groups: near-equal ones, and those of the same words, share one."""
    cluster_of: dict[str, int] = {}  # of words alone
    joined: dict[int, int] = {}

    def root(cluster: int) -> int:
        while (above := joined.get(cluster, cluster)) != cluster:
            cluster = above
        return cluster

    for candidate, cluster in kept:
        words = prompts.normalised(candidate.text)
        low, high = sorted((root(cluster_of.setdefault(words, cluster)), root(cluster)))
        joined[high] = low
    members: dict[int, list[_Candidate]] = {}
    for candidate, cluster in kept:
        members.setdefault(root(cluster), []).append(candidate)
    for family in members.values():
        old = {id(one): groups.get(prompts.prompt_id(source, one.source_key)) for one in family}
        names = sorted({group for group in old.values() if group})
        sides = {prompts.side("prompt", group, split) for group in names}
        fresh = names[0] if names else min(prompts.text_group(one.text) for one in family)
        for one in family:
            if len(sides) > 1 and not old[id(one)]:
                why = f"near to prompts of both sides, of groups {names[0]} and {names[-1]}"
                _keep_out(book, source, one, "between_sides", why)
                continue
            yield (
                one,
                {
                    "source": source,
                    "source_key": one.source_key,
                    "text": one.text,
                    "kind": "prefix" if one.file.kind == "documents" else "instruction",
                    "prompt_group": old[id(one)] or fresh,
                    "origin": f"{one.place[0].removeprefix(label_prefix(source))}:{one.place[1]}",
                    "licence": one.file.licence,
                    **one.more,
                },
            )


def _keep_out(book: Ledger, source: str, one: _Candidate, reason: str, why: str) -> None:
    """Exclude a sound row, and list it with its reason."""
    name, row = one.place
    book.bad(
        _batch(one.file, name), source, row, reason=reason, field=reason, problem=why,
        raw=one.text, what="excluded",
    )  # fmt: skip
