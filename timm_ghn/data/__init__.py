"""Hugging Face data sets of labelled images through timm's transforms."""
