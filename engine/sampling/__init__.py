"""Token choice: parameters, logit rules, masks, sampling and log-probabilities."""
