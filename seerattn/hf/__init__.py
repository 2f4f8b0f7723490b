"""Fitting into transformers and PEFT. Import from the modules, or the public names from `seerattn`."""

# First of all: PEFT's import registers the adapter (see `seerattn._peft_hook`), which imports the modules of this
# package. Were it one of them that imported PEFT first, it would be found half made.
import peft as _peft  # noqa: F401
