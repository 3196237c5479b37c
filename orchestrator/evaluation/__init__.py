"""What a model is worth: tasks with labels, fine-tuning by a protocol, embedding similarity, speed, and the comparison
of models; in `probes/`, what is measured while a stage trains. Leaves out Ray and MLflow, and where a model comes from
(`resolve/folders.py`).
"""
