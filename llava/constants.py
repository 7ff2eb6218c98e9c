"""Special tokens, special values in token ids, labels and packs, and file names, shared by the whole package."""

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

CHECKPOINT_PREFIX = "checkpoint-"
"""Start of the names of the checkpoints that a training run leaves inside its output directory."""
STATE_FILE = "trainer_state.json"
"""State of transformers' trainer in an output directory and its checkpoints."""
DTYPE_NAMES = ("bfloat16", "float16", "float32")
"""Dtypes of weights and computation that a flag may name."""

SWITCH = ("auto", "on", "off")
"""Values of flags such as `--compile` and `--compile_layers`."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."

IMAGE_PREFIX = 0
"""Suffix number of the image prefix of a prefix group in a pack; suffixes are numbered from 1."""
NO_GROUP = -1
"""Group number of a pack's padding, which attends to itself alone so that no row of the mask is empty."""
SYSTEM_PREFIX = -2
"""Group number of the system prefix that all groups of a pack's row share."""
MASK_BLOCK = 128
"""Positions in a block of FlexAttention's mask; the smallest step of padded lengths of packs."""

FP8 = "fp8"
"""Format of weights, where 16, 8 and 4 are numbers of bits."""
