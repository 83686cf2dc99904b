"""Upload of a finished export to the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hpc.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def require_push(repository: str) -> str:
    """The token that :func:`push` will use; it is never shown.

    Raises:
        UserError: the name is none of a repository, the client is not installed, or there is no token.
    """
    if not _NAME.fullmatch(repository):
        raise UserError(f"--push {repository!r} is no repository: give OWNER/NAME")
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise UserError("--push needs huggingface_hub: pip install 'nanodist[export]'") from None
    token = get_token()
    if not token:
        raise UserError("--push needs a token of the hub: set HF_TOKEN, or log in with 'hf auth login'")
    return str(token)


def push(folder: Path, repository: str) -> str:
    """Upload every file of ``folder`` as one commit of a model repository, made private where there is none.

    Args:
        folder: a finished export.
        repository: ``OWNER/NAME`` on the hub (of ``HF_ENDPOINT``, where that is set).

    Returns:
        Where it is.

    Raises:
        UserError: see :func:`require_push`; or the hub refuses or cannot be reached. The folder stays as it is.
    """
    token = require_push(repository)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=token)
    try:
        api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=folder,
            commit_message=f"nanodist export of {folder.name}",
        )
    except Exception as error:  # the client raises its own, its transport's and OSError
        reason = " ".join(str(error).split())[:300].replace(token, "...")
        raise UserError(f"{folder} is written, but was not uploaded to {repository}: {reason}") from None
    return str(getattr(done, "commit_url", done)).replace(token, "...")
