"""``ppow push``: a drafter, or the Space that shows one, becomes a repository of the Hub in one commit.

    ppow push runs/stage2 --repo ORG/NAME --metrics runs/figures --tag v1
    ppow push ORG/NAME --space --repo ORG/SPACE

Files of an earlier push that are no longer part of it are removed by the same commit; unchanged ones are not uploaded
again.
"""

import json
import tempfile
from pathlib import Path

from .config import PushConfig
from .hub import check_ref, check_repository_name, upload
from .repository import assemble
from .space_folder import assemble_space


def main(config: PushConfig) -> None:
    """Assemble the repository, show it, and upload it unless ``dry_run``."""
    check_repository_name(config.repo, "--repo")
    check_ref(config.revision, "--revision")
    if config.tag is not None:
        check_ref(config.tag, "--tag")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (assemble_space if config.space else assemble)(config, folder)
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            print(f"{file.stat().st_size:>14,}  {file.relative_to(folder).as_posix()}")
        record = folder / "config.json"  # which a Space has none of
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("target_name_or_path") is None:
            print("\nThe drafter records no target, so its card says TARGET; name its Hub id with --target.")
        if config.dry_run:
            print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
            return
        url = upload(folder, config)
    tagged = f"; it is tagged {config.tag} now" if config.tag else ""
    print(f"pushed to {url}" if url else f"nothing to change: {config.repo} already holds this{tagged}")
