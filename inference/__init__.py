"""Asking, serving, a page, vLLM, and features kept between questions."""
