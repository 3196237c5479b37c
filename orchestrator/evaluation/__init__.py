"""What a finished model is worth: tasks with labels, fine-tuning by a protocol, embedding similarity, speed, and the
comparison of models. What is measured on held-out rows while a stage trains is in `probes/`. Leaves out Ray
and MLflow, and where a model comes from (`resolve/folders.py`).
"""
