"""The language model over packs: training rows in which several suffixes share a prefix."""
