"""Texts in, texts out: a model with gates that answers on the command line and over HTTP."""
