"""Models and GHNs on the Hub: what is known of one, its card, its files, and the commit that takes it there."""
