"""``ppow push``: a drafter becomes a repository of the Hub, in one commit, with a card of recorded facts only.

    ppow push runs/stage2 --repo ORG/NAME --metrics runs/figures --tag v1
    ppow push ORG/NAME --space --repo ORG/SPACE

The repository holds the weights (safetensors only), the configuration with its ``auto_map``, the generation config, the
code that ``trust_remote_code=True`` and ``custom_generate=`` load, the provenance of the training, metrics.json and the
card. It loads without this package. Files of an earlier push that are no longer part of it are removed by the same
commit; unchanged ones are not uploaded again.
"""

import atexit
import dataclasses
import json
import logging
import re
import shutil
import tempfile
import threading
from pathlib import Path

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCardData,
    RepoCard,
    RepoFile,
    RepoFolder,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers import GenerationConfig

from ppow import PPOWConfig, PPOWDrafter
from ppow.drafting_ppow import DraftOptions
from ppow.model_cards import render

from . import figures as measured
from . import provenance
from .config import PushConfig
from .files import write_json
from .fingerprints import fingerprint
from .loading import named
from .sources import ENDINGS

logger = logging.getLogger(__name__)

SHARD = "4GB"
SPACE = Path(__file__).resolve().parents[1] / "space"
METRICS, PICTURE = "metrics.json", "acceptance.png"
# what a push removes when it is no longer part of the repository; anything else there is somebody else's
OWNED = re.compile(
    r"[^/]+\.(safetensors|safetensors\.index\.json|py)|custom_generate/.+|metrics\.json|acceptance\.png|provenance\.json"
)
# names that git takes for no tag or branch
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|(^|/)\.|^[-/]|[./]$|\.lock(/|$)|^$")
_PRIVATE = re.compile(r"hf_[A-Za-z0-9]{16,}|(?:/home/|/root/|/Users/|[A-Z]:\\Users\\)[^\s\"']*")


def main(config: PushConfig) -> None:
    """Assemble the repository, show it, and upload it unless ``dry_run``."""
    check_repository_name(config.repo, "--repo")
    check_ref(config.revision, "--revision")
    if config.tag is not None:
        check_ref(config.tag, "--tag")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if config.space:
            assemble_space(config.drafter, folder, config.target, config.baseline)
        else:
            pinned = config.tag or config.revision
            assemble(config.drafter, folder, config.repo, pinned, config.metrics, config.license, config.target)
        print(tree(folder))
        if not config.space and read_json(folder / "config.json").get("target_name_or_path") is None:
            print("\nThe drafter records no target, so its card says TARGET; name its Hub id with --target.")
        if config.dry_run:
            print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
            return
        url = upload(folder, config, kind="space", space_sdk="gradio") if config.space else upload(folder, config)
    tagged = f"; it is tagged {config.tag} now" if config.tag else ""
    print(f"pushed to {url}" if url else f"nothing to change: {config.repo} already holds this{tagged}")


# -- the repository ----------------------------------------------------------------------------------------------------


def assemble(
    drafter: str | Path,
    folder: Path,
    repo: str,
    revision: str = "main",
    metrics: str | None = None,
    license: str | None = None,
    target: str | None = None,
) -> None:
    """Write everything that the Hub repository of a drafter holds.

    Args:
        drafter: Hub id or folder; its weights are loaded and written anew, so that a damaged one is noticed here.
        folder: an empty folder.
        repo, revision: what the card's snippets load.
        metrics: output folder of ``ppow evaluate`` (or its metrics.json); none: the figures beside the drafter, if any.
        license: licence of the weights, as the Hub names it.
        target: Hub id of the target; none: the one that the drafter records.

    Raises:
        ValueError: for something that is no drafter, damaged weights or ones that are not finite, a target that is a
            folder, missing metrics or those of other weights, or a file with an access token or a path of this machine
            in it.
    """
    source = Path(drafter)
    if target is not None:
        check_no_folder(target, "--target")
    with named("drafter", drafter):
        model = PPOWDrafter.from_pretrained(drafter, dtype="auto")
    if target is not None:
        model.config.target_name_or_path = target
    if model.config.target_name_or_path is not None:
        check_id(model.config.target_name_or_path, "--target")
    broken = [name for name, weight in model.state_dict().items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise ValueError(f"{drafter} has weights that are not finite ({', '.join(broken[:3])}); train it again.")
    model.save_pretrained(folder, max_shard_size=SHARD)
    record = next((at / provenance.FILE for at in (source, run_of(source)) if (at / provenance.FILE).is_file()), None)
    if record:
        write_json(folder / provenance.FILE, provenance.scrub(provenance.read(record)))
    figures = find_metrics(source, metrics)
    if figures:
        write_json(folder / METRICS, provenance.scrub(json.loads(figures.read_text(encoding="utf-8"))))
        if (figures.parent / PICTURE).is_file():
            shutil.copyfile(figures.parent / PICTURE, folder / PICTURE)
    (folder / "README.md").write_text(card(folder, repo, revision, license), encoding="utf-8")
    check_private(folder)


def run_of(source: Path) -> Path:
    """The run's folder of a checkpoint, RUN/checkpoints/step-000123; of anything else itself."""
    return source.parents[1] if source.parent.name == "checkpoints" else source


def find_metrics(source: Path, metrics: str | None) -> Path | None:
    """The metrics.json that ``metrics`` names, or that lies beside the drafter."""
    if metrics is None:
        return source / METRICS if (source / METRICS).is_file() else None
    path = Path(metrics) / METRICS if Path(metrics).is_dir() else Path(metrics)
    if not path.is_file():
        raise ValueError(f"--metrics {metrics}: no {METRICS} there; give the output folder of `ppow evaluate`.")
    return path


def card(folder: Path, repo: str, revision: str | None = "main", license: str | None = None) -> str:
    """The model card of an assembled folder, from its own files alone.

    Args:
        folder: with config.json and, where there are any, metrics.json, provenance.json and the picture.
        repo: what the snippets load; with ``revision`` None a folder beside this package instead of a Hub repository.

    Raises:
        ValueError: for figures that were measured with other weights, or that do not say with which.
    """
    config, metrics, training = (read_json(folder / name) for name in ("config.json", METRICS, provenance.FILE))
    stages = chain(training) if training else []
    if metrics:
        check_figures(metrics, folder, config.get("target_name_or_path"), stages)
    drafting = GenerationConfig(**(read_json(folder / "generation_config.json") or {}))
    facts = {
        "config": config,
        "drafting": dataclasses.asdict(DraftOptions.resolve(drafting)),
        "metrics": metrics,
        "identical": measured.identical,
        "without_drafts": measured.without_drafts,
        "stages": stages,
        "trained": how_trained(stages),
        "repo": repo,
        "title": repo.rpartition("/")[2] if revision else f"The bundled {repo.rpartition('/')[2]}",
        "revision": revision,
        "picture": (folder / PICTURE).is_file(),
        "metadata": metadata(config, metrics, stages, repo, license),
    }
    return render("drafter", facts)


def check_figures(metrics: dict, folder: Path, target: str | None, stages: list[dict]) -> None:
    """Raise a ValueError unless figures were measured with the drafter in ``folder`` and with its target.

    The target's weights are those that the last stage recorded, and those of ``target`` where they are on this machine.
    """
    again = "Measure this drafter with `ppow evaluate` and name that folder with --metrics"
    weights = metrics.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"{METRICS} does not say which weights it was measured with, as an older version's. {again}.")
    own = fingerprint(folder, whole=True)
    if weights.get("drafter") != own:
        whose = "its baseline" if weights.get("baseline") == own else "another one"
        raise ValueError(
            f"{METRICS} holds the figures of other weights ({str(weights.get('drafter'))[:12]}) than this drafter's "
            f"({str(own)[:12]}), which are {whose} there. {again}, or move {METRICS} away."
        )
    recorded = [stage["weights"]["target"] for stage in stages if stage.get("weights", {}).get("target")][-1:]
    here = fingerprint(target) if target else None
    for made_for in [*recorded, *([here] if here else [])]:
        if weights.get("target") != made_for:
            raise ValueError(
                f"{METRICS} was measured on a target with other weights ({str(weights.get('target'))[:12]}) than this "
                f"drafter's target has ({made_for[:12]}). {again}."
            )


def how_trained(stages: list[dict]) -> str | None:
    """What the last stage of a drafter's training was: "exact" and "rollout" are PPOW's two estimators, "control"
    another objective of its comparison, "supervised" stage 1; None where that was not recorded."""
    last = stages[-1] if stages else {}
    options = last.get("config", {})
    if last.get("command") != "reinforce":
        return "supervised" if last.get("command") == "supervised" else None
    return options.get("estimator") if options.get("objective", "ppow") == "ppow" else "control"


def metadata(config: dict, metrics: dict | None, stages: list[dict], repo: str, license: str | None) -> str:
    """The card's YAML header."""
    target = config.get("target_name_or_path")
    data = {stage["config"]["data"] for stage in stages if stage.get("config", {}).get("data")}
    data = {name for name in data if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(ENDINGS)}
    fields = {
        "library_name": "transformers",
        "license": license,
        "base_model": target,
        "base_model_relation": "adapter" if target else None,
        "datasets": sorted(data),
        "tags": ["ppow", "speculative-decoding", "eagle-3", "assistant-model"],
    }
    header = ModelCardData(**{key: value for key, value in fields.items() if value})
    if metrics:
        header = header.to_dict() | {"model-index": [{"name": repo, "results": model_index(metrics)}]}
        header = ModelCardData(ignore_metadata_errors=False, **header)
    return header.to_yaml()


def model_index(metrics: dict) -> list[dict]:
    """The measured figures in the Hub's form."""
    results = []
    for name, result in metrics["results"].items():
        figures = {"acceptance length": result["acceptance_length"], "speedup": result["speedup"]}
        results.append(
            {
                "task": {"type": "text-generation", "name": "speculative decoding"},
                "dataset": {"type": name.split(" ")[0], "name": name, "config": name.split(" ")[-1]},
                "metrics": [
                    {"type": key.replace(" ", "_"), "name": key, "value": round(value, 4)}
                    for key, value in figures.items()
                ],
            }
        )
    return results


def chain(record: dict) -> list[dict]:
    """The stages that led to a drafter, oldest first."""
    stages = []
    while record:
        stages.insert(0, record)
        record = record.get("started_from")
    return stages


def check_private(folder: Path) -> None:
    """Refuse text files that hold an access token or a path of this machine."""
    for file in sorted(folder.rglob("*")):
        if file.suffix not in {".json", ".md", ".jinja"}:
            continue
        text = file.read_text(encoding="utf-8")
        if found := _PRIVATE.search(text):
            what = "an access token" if found[0].startswith("hf_") else f"the local path {found[0]}"
        elif file.suffix == ".json" and provenance.scrub(json.loads(text)) != json.loads(text):
            what = "a local path"
        else:
            continue
        raise ValueError(f"{file.relative_to(folder)} holds {what}, which must not be published; remove it.")


def tree(folder: Path) -> str:
    """The files of a folder with their sizes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return "\n".join(f"{file.stat().st_size:>14,}  {file.relative_to(folder).as_posix()}" for file in files)


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def assemble_space(drafter: str, folder: Path, target: str | None = None, baseline: str | None = None) -> None:
    """Write the demo Space of a pair that is on the Hub, pinned to the commits that it is at now.

    Args:
        drafter: Hub id of a drafter.
        folder: an empty folder.
        target: Hub id of its target; none: the one that the drafter records.
        baseline: Hub id of a second drafter to race, if any.

    Raises:
        ValueError: outside a checkout of the repository, or for a pair that is not on the Hub.
    """
    if not SPACE.is_dir():
        raise ValueError(
            "The Space's files come with a checkout of the repository, not with the package; run this there."
        )
    given = {"the drafter": drafter, "--target": target, "--baseline": baseline}
    for option, name in given.items():
        if name is not None:
            check_no_folder(name, option)
    revision = commit_of(drafter, "the drafter")
    target = target or PPOWConfig.from_pretrained(drafter, revision=revision).target_name_or_path
    if target is None:
        raise ValueError(f"{drafter} does not record its target; name its Hub id with --target.")
    names = {"target": target, "target_revision": commit_of(target, "--target")}
    names |= {"drafter": drafter, "drafter_revision": revision}
    if baseline is not None:
        names |= {"baseline": baseline, "baseline_revision": commit_of(baseline, "--baseline")}
    shutil.copytree(SPACE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "pair.json"), dirs_exist_ok=True)
    write_json(folder / "pair.json", names)
    front = RepoCard.load(folder / "README.md")
    front.data["models"] = [model for model in (target, drafter, baseline) if model]
    front.save(folder / "README.md")
    check_private(folder)


# -- the upload --------------------------------------------------------------------------------------------------------


def check_id(name: str, option: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{option} {name}: expected ORG/NAME, as the Hub writes it ({error}).") from None


def check_repository_name(name: str, option: str) -> None:
    """Raise a ValueError unless ``name``, given with ``option``, can be the name of a repository to push to."""
    check_id(name, option)
    if "/" not in name:
        raise ValueError(f"{option} {name}: expected ORG/NAME; say whose repository it is.")


def check_no_folder(name: str, option: str) -> None:
    if Path(name).is_dir():
        what = option.removeprefix("--").removeprefix("the ")
        raise ValueError(
            f"{option} {name}: expected the Hub id of the {what}, ORG/NAME, but this is a folder here. Push the {what} "
            "to the Hub first, then name its repository."
        )


def check_ref(name: str, option: str) -> None:
    if _NO_REF.search(name):
        raise ValueError(
            f"{option} {name!r}: expected a name that git takes, such as v1.0: letters, digits and single . _ - / "
            "between them."
        )


def commit_of(name: str, option: str) -> str:
    """The commit that a model repository is at now. Raises ValueError when it is not to be found."""
    check_id(name, option)
    try:
        return HfApi().model_info(name).sha
    except RepositoryNotFoundError:
        raise ValueError(
            f"{option} {name}: the Hub has no such repository, or your token may not see it; correct the name, or push "
            "it first."
        ) from None
    except (HTTPError, OSError) as error:
        why = provenance.scrub(str(error))
        raise ValueError(f"{option} {name}: the Hub could not be asked for it ({why}); try again.") from None


def upload(folder: Path, config: PushConfig, message: str | None = None, kind: str = "model", **new) -> str | None:
    """Upload an assembled folder in one commit: -> its address, or None when there was nothing to change.

    The commit names the one that it was made for, so that of two pushes at once one is refused and none is mixed in.

    Args:
        folder: everything that the commit is to leave in the repository, of what belongs to a push.
        config: where to, and how.
        message: of the commit.
        kind: ``model`` or ``space``.
        new: what ``create_repo`` needs besides.

    Raises:
        ValueError: what the Hub refuses or the network breaks off, with what to do about it. What a push changes
            becomes visible at once or not at all.
    """
    api, repo = HfApi(), {"repo_id": config.repo, "repo_type": kind}
    try:
        api.create_repo(**repo, private=config.private or None, exist_ok=True, **new)
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
    return f"{api.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{config.repo}/commit/{head}"


def prepare(api: HfApi, repo: dict, config: PushConfig) -> str:
    """Make the branch where it is missing; -> the commit that it is at."""
    refs = api.list_repo_refs(**repo)
    if config.tag and any(tag.name == config.tag for tag in refs.tags):
        raise ValueError(f"{config.repo} has a tag {config.tag} already; tags stay, choose another one.")
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    if config.revision not in heads and not config.create_pr:
        api.create_branch(**repo, branch=config.revision)
        heads[config.revision] = heads["main"]
    if config.revision not in heads:
        raise ValueError(f"{config.repo} has no branch {config.revision} to open a pull request for; name another one.")
    return heads[config.revision]


def changes(api: HfApi, repo: dict, folder: Path, head: str) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit on ``head`` has to change: files that differ, and files of earlier pushes that are gone."""
    known = {item.path: item for item in api.list_repo_tree(**repo, revision=head, recursive=True)}
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    added = [CommitOperationAdd(name, file) for name, file in files.items() if not same(file, known.get(name))]
    return [*added, *(CommitOperationDelete(name) for name in known if OWNED.fullmatch(name) and name not in files)]


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
    return (
        f"The push to {repo} broke off ({provenance.scrub(str(why))}). It is visible there whole or not at all. "
        "Push again: nothing that has arrived is uploaded twice."
    )


class BackgroundPush:
    """Pushes checkpoints while training goes on; a failed upload is a warning, never an error.

    One upload runs at a time; a checkpoint that falls due meanwhile is left out, the last one (``wait``) is not.

    Args:
        repo: ORG/NAME.
        private: whether a new repository is private.
    """

    def __init__(self, repo: str, private: bool = False):
        check_repository_name(repo, "--push-to-hub")
        self.repo, self.private = repo, private
        self.thread: threading.Thread | None = None

    def push(self, drafter: Path, step: int) -> bool:
        """Start uploading the drafter in a folder; -> whether it was started. The folder may change afterwards."""
        if self.thread is not None and self.thread.is_alive():
            return False
        try:
            folder = Path(tempfile.mkdtemp(prefix="ppow-push-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)  # should the process end before the upload
        except OSError as error:
            logger.warning("Step %d was not pushed to %s (%s); training goes on.", step, self.repo, error)
            return False
        if not self._try(step, folder, lambda: assemble(drafter, folder, self.repo)):
            return False
        self.thread = threading.Thread(target=self._upload, args=(folder, step), daemon=True)
        self.thread.start()
        return True

    def wait(self) -> None:
        """Until the upload that is under way has ended."""
        if self.thread is not None:
            self.thread.join()

    def _upload(self, folder: Path, step: int) -> None:
        config = PushConfig(drafter=str(folder), repo=self.repo, private=self.private)
        if self._try(step, folder, lambda: upload(folder, config, message=f"step {step}")):
            shutil.rmtree(folder, ignore_errors=True)

    def _try(self, step: int, folder: Path, action) -> bool:
        """Do something that must not end the training, whatever goes wrong; -> whether it went well."""
        try:
            action()
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            text = provenance.scrub(f"{error}")
            logger.warning("Step %d was not pushed to %s (%s); training goes on.", step, self.repo, text)
            return False
        return True
