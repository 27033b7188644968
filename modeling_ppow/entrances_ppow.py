"""The entrances to the decoding loop; all lead through ``target.generate(..., assistant_model=drafter)``.

So whatever way a call comes, transformers' checks and preparations are the same, and so are ours. This module imports
nothing of ours: it is all that ``custom_generate=`` has to load besides the drafter itself.
"""

import functools
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

LOADING_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "code_revision", "proxies")


def register_assisted_decoding() -> None:
    """Let ``generate(assistant_model=...)`` hand over to assistants that bring their own decoding method.

    ``generate`` finds its decoding method on the class, so one is wrapped on ``GenerationMixin``, once per process
    however many copies of this module are loaded (installed package, remote code). Assistants without the method
    ``assisted_decoding`` are untouched; of a compiled one, what was compiled is asked.
    """
    original = GenerationMixin._assisted_decoding
    if getattr(original, "dispatches_to_assistant", False):
        return

    @functools.wraps(original)
    def _assisted_decoding(
        self: PreTrainedModel,
        input_ids: torch.Tensor,
        *args: Any,
        assistant_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        own = getattr(unwrapped(assistant_model), "assisted_decoding", None)
        if own is not None:
            return own(self, input_ids, *args, **kwargs)
        return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)

    vars(_assisted_decoding)["dispatches_to_assistant"] = True
    GenerationMixin._assisted_decoding = _assisted_decoding


def unwrapped(assistant: Any) -> Any:
    """The drafter itself, if ``torch.compile(drafter)`` was passed."""
    return getattr(assistant, "_orig_mod", assistant)


class DrafterWithOptions:
    """A drafter for one call, with fields of ``DraftOptions`` that are to win over all others."""

    def __init__(self, drafter: PreTrainedModel, options: dict[str, Any]):
        self.drafter, self.options = drafter, options

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def assisted_decoding(
        self, target: PreTrainedModel, *args: Any, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        """The drafter's own, with the options in the call's generation config."""
        vars(generation_config).update(self.options)  # the call's own copy
        return self.drafter.assisted_decoding(target, *args, generation_config=generation_config, **kwargs)


def generate(model: PreTrainedModel, assistant_model: PreTrainedModel | None = None, **kwargs: Any) -> Any:
    """Entrance for ``model.generate(..., custom_generate=<drafter repository>, assistant_model=drafter)``.

    Takes every argument of ``generate`` and, besides, every field of ``DraftOptions``.

    Raises:
        ValueError: without an assistant, or with one that is not a PPOW drafter.
    """
    drafter = unwrapped(assistant_model)
    if not hasattr(drafter, "assisted_decoding"):
        raise ValueError(
            f"custom_generate needs assistant_model=<PPOW drafter>, got {type(assistant_model).__name__}. Load it with "
            "AutoModel.from_pretrained(<drafter repository>, trust_remote_code=True)."
        )
    for name in LOADING_OPTIONS:  # transformers hands on what it loaded this module with
        kwargs.pop(name, None)
    chosen = {name: kwargs.pop(name) for name in drafter.draft_options if kwargs.get(name) is not None}
    register_assisted_decoding()
    return type(model).generate(model, assistant_model=DrafterWithOptions(drafter, chosen), **kwargs)
