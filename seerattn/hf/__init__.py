"""Fitting into transformers and PEFT. Import from the modules, or the public names from `seerattn`."""
