"""LightXML: an encoder, recall of label groups, ranking of the labels inside them, and prediction.

Read `tokenizer`, `batch`, `encoder`, `lexical`, `recall`, `ranking`, then `lightxml`, which puts them together.
"""
