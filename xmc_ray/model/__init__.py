"""LightXML: an encoder, recall of label groups, ranking of the labels inside them, and prediction.

Read `text`, `encoder`, `lexical`, `recall`, `ranking`, then `lightxml`, which puts them together.
"""
