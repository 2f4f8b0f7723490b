"""Sparse prompts and answers in vLLM: a plug-in that puts gates before the attention backend which vLLM takes.

vLLM finds it by its entry point (`seerattn.vllm.plugin`) wherever both are installed, and it does nothing until
``additional_config`` names a folder of gates. Import from the modules.
"""
