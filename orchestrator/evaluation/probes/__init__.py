"""What is measured while a stage trains: the held-out divergence, and probes that need no training and few labels or
none. Training's bits do not depend on it. Scores of finished models are in `evaluation/`.
"""
