"""The command line of this process without its secrets, so that it may be written to a file.

Secrets are found by their names, as in --api-key, HF_TOKEN= or "password":, and by the shapes that well-known keys
have. When in doubt, a word is hidden.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

HIDDEN = "***"

#: Parts of the names of secrets. The tokens that a model reads are none: --tokenizer, --max-tokens, --eos-token-id.
_NAME = (
    r"(?:api[-_.]?k|access[-_.]?k|private[-_.]?k|encryption[-_.]?k|signing[-_.]?k|tok(?!en)(?![a-z])|"
    r"token(?!iz|s(?![a-z])|[-_.]?ids?(?![a-z]))|secr|passw|passphrase|pwd|credential|auth(?!or(?!iz))|bearer|cookie)"
)
_SECRET = re.compile(_NAME, re.IGNORECASE)

#: Secrets inside a word; group 1 of each pattern stays.
_INSIDE = (
    re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]*@", re.IGNORECASE),  # user:password@
    re.compile(rf"""(["'][\w.-]*{_NAME}[\w.-]*["']\s*:\s*)(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,}}\]\s]+)""", re.I),
    re.compile(rf"([?&;,\s][\w.-]*{_NAME}[\w.-]*=)[^&;\s]+", re.IGNORECASE),
    re.compile(r"(\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA))[\w-]{8,}"),
)


#: A scheme whose secret may be the next word.
_SCHEME = re.compile(r"(\b(?:bearer|basic)\s+)[^\s\"']+", re.IGNORECASE)


def of_process() -> str:
    """The command line as `ps` shows it (engines write the role of a process there), with its secrets hidden."""
    try:
        raw = Path("/proc/self/cmdline").read_bytes()
    except OSError:
        return redacted(sys.argv)
    words = raw.decode(errors="replace").rstrip("\0 ").split("\0")
    # an engine that has renamed its process has left a single text
    return redacted(words if len(words) > 1 else words[0].split())


def redacted(words: Iterable[str]) -> str:
    """The words as one line. All words after a secret flag are hidden, as --api-key takes several keys."""
    return _SCHEME.sub(rf"\1{HIDDEN}", " ".join(word for word in _redacted(words) if word))


def _redacted(words: Iterable[str]) -> Iterator[str]:
    hiding = False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            secret = bool(_SECRET.search(name))
            hiding = secret and not equals
            yield f"{name}={HIDDEN}" if secret and equals else name + equals + _inside(value)
        elif hiding:
            yield HIDDEN
        elif equals and re.fullmatch(r"[\w.-]+", name) and _SECRET.search(name):
            yield f"{name}={HIDDEN}"
        else:
            yield _inside(word)


def _inside(word: str) -> str:
    for pattern in _INSIDE:
        word = pattern.sub(rf"\1{HIDDEN}@" if "://" in pattern.pattern else rf"\1{HIDDEN}", word)
    return word
