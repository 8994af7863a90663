"""Import the code of a model before anything of it is loaded.

transformers imports an architecture when the first model of that kind is built. On the side of
the meters that would be memory and seconds of "loading the weights"; done before, it belongs to
the process, as the rest of the libraries.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def import_architecture(path: Path) -> None:
    """Import what the model in `path` will need; does nothing where that cannot be told.

    What is wrong with a model is for the loader to say, in full.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    # Code that comes with a checkpoint is not run here.
    with suppress(OSError, ValueError, KeyError, ImportError, AttributeError):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
