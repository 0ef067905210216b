"""Whether a model may be served: signed by a trusted key, or allowed by name.

- What was altered after it was signed is never served, allowed or not.
- Checked before Ray starts and again by each replica, which may be on another machine; the files' own digests are `verify_model`'s part.
- A small model that only guesses tokens for another needs no signature: every guess is checked, so it cannot change an answer.
"""

from __future__ import annotations

from pathlib import Path

from infra.errors import ArtifactError
from infra.settings import load_settings
from infra.signing import UnsignedError, check_seal, public_file, trusted_keys
from serving.config import ServeConfig


def settled_trust(config: ServeConfig) -> ServeConfig:
    """The settings with an absolute path to the trusted keys: those that it names, or else this machine's own."""
    path = config.trusted_keys_file or public_file(load_settings().signing_key_file)
    return config.model_copy(update={"trusted_keys_file": path.absolute()})


def require_trusted(folder: Path, name: str, config: ServeConfig) -> None:
    """Raises ArtifactError where the model or adapter in `folder` is not signed, or was altered after it was.

    `config` is what `settled_trust` gives. Raises ConfigError where the trusted keys cannot be read.
    """
    path = config.trusted_keys_file
    assert path is not None, "settled_trust comes first"
    try:
        if not path.is_file():
            raise UnsignedError(f"{folder}: no key is trusted here, since {path} does not exist")
        check_seal(folder, trusted_keys(path))
    except UnsignedError as error:
        if name in config.allow_unsigned:
            return
        raise ArtifactError(
            f"{error.message.rstrip('.')}, and {name!r} is not in serve.allow_unsigned. `slipway run` signs what it promotes. "
            f"Sign this one yourself with `slipway sign {folder}`, or allow it by name: --set serve.allow_unsigned=[{name}]."
        ) from error


def require_all_trusted(model_dir: Path, name: str, config: ServeConfig) -> None:
    """The same for a model and the adapters beside it."""
    require_trusted(model_dir, name, config)
    for adapter, folder in config.adapters.items():
        require_trusted(folder, adapter, config)
