"""Exports: the model that a plan makes, written from the original's files one tensor at a time.

skeleton   a model without its weights: names and shapes
stored     which stored tensors hold a parameter
writers    a writer that is read from the files, expert by expert
layout     the files that are written, and where each tensor goes
scratch    the folder they are written in, which outlives a killed process
merged     the whole model, with the writers edited
factors    the low-rank parts of an edit, and what they leave out
adapter    the edit alone, as a PEFT adapter
"""
