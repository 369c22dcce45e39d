"""What is declared: priors, likelihoods, guides, and the pairs they make."""
