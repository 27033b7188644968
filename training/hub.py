"""Speaking to the Hub: names that it takes, one commit per push, and checkpoints pushed while training goes on."""

import contextlib
import logging
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, RepoFolder
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from . import provenance
from .config import PushConfig
from .repository import assemble, check_id

logger = logging.getLogger(__name__)

# what a push removes when it is no longer part of the repository; anything else there is somebody else's
_OWNED = re.compile(
    r"[^/]+\.(safetensors|safetensors\.index\.json|py)|custom_generate/.+|metrics\.json|acceptance\.png|provenance\.json"
)
# names that git takes for no tag or branch
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|(^|/)\.|^[-/]|[./]$|\.lock(/|$)|^$")


def check_repository_name(name: str, option: str) -> None:
    """Raise a ValueError unless ``name``, given with ``option``, can be the name of a repository to push to."""
    check_id(name, option)
    if "/" not in name:
        raise ValueError(f"{option} {name}: expected ORG/NAME; say whose repository it is.")


def check_ref(name: str, option: str) -> None:
    """Raise a ValueError unless git takes ``name``, given with ``option``, for a branch or a tag."""
    if _NO_REF.search(name):
        raise ValueError(
            f"{option} {name!r}: expected a name that git takes, such as v1.0: letters, digits and single . _ - / "
            "between them."
        )


def upload(folder: Path, config: PushConfig, message: str | None = None) -> str | None:
    """Upload an assembled folder in one commit: -> its address, or None when there was nothing to change.

    The commit names the one that it was made for, so that of two pushes at once one is refused and none is mixed in.

    Args:
        folder: everything that the commit is to leave in the repository, of what belongs to a push.
        config: where to, and how.
        message: of the commit.

    Raises:
        ValueError: what the Hub refuses or the network breaks off, with what to do about it. What a push changes
            becomes visible at once or not at all.
    """
    api, repo = HfApi(), {"repo_id": config.repo, "repo_type": "space" if config.space else "model"}
    try:
        sdk = "gradio" if config.space else None
        api.create_repo(**repo, private=config.private or None, exist_ok=True, space_sdk=sdk)
        if config.private and not api.repo_info(**repo).private:
            raise ValueError(
                f"{config.repo} exists and is public; make it private on the Hub, or push without --private."
            )
        head = prepare(api, repo, config)
        operations = changes(api, repo, folder, head)
        if operations:
            commit = api.create_commit(
                **repo,
                operations=operations,
                commit_message=message or f"ppow push {config.tag or ''}".strip(),
                revision=config.revision,
                create_pr=config.create_pr,
                parent_commit=head,
            )
            head = commit.oid
        if config.tag:
            api.create_tag(**repo, tag=config.tag, revision=head)
    except HfHubHTTPError as error:
        raise ValueError(refusal(error, config.repo)) from None
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: how huggingface_hub and hf_xet report an upload
        raise ValueError(broken_off(config.repo, error)) from error
    if not operations:
        return None
    if commit.pr_url:
        return commit.pr_url
    return f"{api.endpoint}/{'spaces/' if config.space else ''}{config.repo}/commit/{head}"


def prepare(api: HfApi, repo: dict, config: PushConfig) -> str:
    """Make the branch where it is missing; -> the commit that it is at."""
    refs = api.list_repo_refs(**repo)
    if config.tag and any(tag.name == config.tag for tag in refs.tags):
        raise ValueError(f"{config.repo} has a tag {config.tag} already; tags stay, choose another one.")
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    if config.revision in heads:
        return heads[config.revision]
    if config.create_pr:
        raise ValueError(f"{config.repo} has no branch {config.revision} to open a pull request for; name another one.")
    api.create_branch(**repo, branch=config.revision)
    return heads["main"]


def changes(api: HfApi, repo: dict, folder: Path, head: str) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit on ``head`` has to change: files that differ, and files of earlier pushes that are gone."""
    known = {item.path: item for item in api.list_repo_tree(**repo, revision=head, recursive=True)}
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    added = [CommitOperationAdd(name, file) for name, file in files.items() if not same(file, known.get(name))]
    return [*added, *(CommitOperationDelete(name) for name in known if _OWNED.fullmatch(name) and name not in files)]


def same(file: Path, known: RepoFile | RepoFolder | None) -> bool:
    """Whether the Hub has this very file. Large ones are known there by their sha256, others by their git hash."""
    if not isinstance(known, RepoFile) or known.size != file.stat().st_size:
        return False
    with file.open("rb") as content:
        if known.lfs:
            return sha_fileobj(content).hex() == known.lfs.sha256
        return git_hash(content.read()) == known.blob_id


def refusal(error: HfHubHTTPError, repo: str) -> str:
    """What a refused push means and what to do, without anything secret."""
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision; push to an existing branch, or name a new one with --revision."
    if status == 401:
        return f"The Hub knows no token of yours, or it has expired; run `hf auth login` and push to {repo} again."
    if status == 403:
        return f"Your token may not write to {repo}; use one with write access, or push with --create-pr."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repository {repo}, or your token may not see it."
    if status == 412:
        return f"Somebody else pushed to {repo} meanwhile; nothing of this push is visible. Push again."
    if status >= 500:
        return broken_off(repo, f"the Hub answers {status}")
    return f"The Hub refused the push to {repo} (status {status}): {error.server_message or error}"


def broken_off(repo: str, why: Exception | str) -> str:
    """What a push that ended half-way means and what to do, without anything secret."""
    return (
        f"The push to {repo} broke off ({provenance.scrub(str(why))}). It is visible there whole or not at all. "
        "Push again: nothing that has arrived is uploaded twice."
    )


class BackgroundPush:
    """Pushes checkpoints while training goes on; a failed upload is a warning, never an error.

    One upload runs at a time; a checkpoint that falls due meanwhile is left out, the last one (``wait``) is not.
    """

    def __init__(self, repo: str):
        check_repository_name(repo, "--push-to-hub")
        self.repo = repo
        self.thread: threading.Thread | None = None

    def push(self, drafter: Path, step: int) -> None:
        """Start uploading the drafter in a folder, which may change afterwards."""
        if self.thread is not None and self.thread.is_alive():
            return
        with self._going_on(step), contextlib.ExitStack() as removing:
            made = tempfile.TemporaryDirectory(prefix="ppow-push-", ignore_cleanup_errors=True)
            folder, config = Path(removing.enter_context(made)), PushConfig(drafter=str(drafter), repo=self.repo)
            assemble(config, folder)
            given = (config, folder, step, removing.pop_all())
            self.thread = threading.Thread(target=self._upload, args=given, daemon=True)
            self.thread.start()

    def wait(self) -> None:
        """Until the upload that is under way has ended."""
        if self.thread is not None:
            self.thread.join()

    def _upload(self, config: PushConfig, folder: Path, step: int, removing: contextlib.ExitStack) -> None:
        with self._going_on(step), removing:
            upload(folder, config, message=f"step {step}")

    @contextlib.contextmanager
    def _going_on(self, step: int) -> Iterator[None]:
        """Inside, whatever goes wrong is told as a warning and does not end the training."""
        try:
            yield
        except Exception as error:
            text = provenance.scrub(f"{error}")
            logger.warning("Step %d was not pushed to %s (%s); training goes on.", step, self.repo, text)
