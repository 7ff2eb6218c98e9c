"""Names and numbers that the whole project shares; the values are the original LLaVA's."""

IGNORE_INDEX = -100
"""Label of a position that carries no supervision."""

IMAGE_TOKEN_INDEX = -200
"""Stands in `input_ids` where the features of one image go; never a row of the embedding table."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
"""Written by users in a question where the image belongs; replaced by the model's own image token."""

DEFAULT_TEMPLATE = "vicuna_v1"
"""Conversation template of weights that carry none."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."

TRUNK = 0
"""Branch number of a group's shared prefix in a pack; branches are numbered from 1."""
NO_GROUP = -1
"""Group number of a pack's padding, which sees itself alone so that no row of the mask is empty."""
STEM = -2
"""Group number of what all groups of a pack's row begin with, computed once for them."""
