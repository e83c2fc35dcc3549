"""What a model hub says of repositories: their revisions, and whether one is there.

Only here is a hub asked, and only about names. This room was written from the client's
documentation and tested with answers made up for it; it was never run against a hub.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from pipelines.errors import PolicyUnavailableError

KEPT = "watched.json"  # under policies/: revisions and commits by repository, as last answered


def revisions(repository: str) -> dict[str, str]:
    """Branches and tags of a repository, with their commits.

    Raises:
        OSError: the hub cannot be reached, or has no such repository.
    """
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repository)
    except Exception as error:  # of the client and of its own client, of many kinds
        raise OSError(str(error)) from error
    return {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}


def check_revision(repository: str, revision: str) -> None:
    """Hold a hub's model to be there: in the local cache, or known to the hub.

    Raises:
        PolicyUnavailableError: no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RevisionNotFoundError

    if isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(repository, revision=revision)
    except RevisionNotFoundError as error:
        known = sorted(revisions(repository))
        near = difflib.get_close_matches(revision, known, n=3, cutoff=0.5) or known[:3]
        msg = f"{repository} has no revision {revision!r}; nearest: {', '.join(near) or 'none'}"
        raise PolicyUnavailableError(msg) from error
    except Exception as error:  # of the client and of its own client, of many kinds
        msg = (
            f"{repository}@{revision} is not in the cache and the hub does not give it "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); correct the "
            "name, log in for a gated model, or fetch it where there is a network"
        )
        raise PolicyUnavailableError(msg) from error


def ask(
    repositories: Iterable[str],
    home: Path,
    listed: Callable[[str], dict[str, str]] = revisions,
) -> dict[str, str]:
    """Ask for the revisions of repositories and keep the answers; faults by repository."""
    found, faults = kept(home), {}
    for repository in sorted(set(repositories)):
        try:
            found[repository] = listed(repository)
        except OSError as error:
            faults[repository] = f"the hub does not list its revisions: {error}"
    if found:
        path = home / "policies" / KEPT
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        part.replace(path)
    return faults


def kept(home: Path) -> dict[str, dict[str, str]]:
    """What `ask` was last told."""
    path = home / "policies" / KEPT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
