"""DeepNets-1M: the data set of architectures of GHN-2 (Knyazev et al., 2021)."""
