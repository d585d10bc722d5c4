"""Which recipes are measured, with which settings, and how often."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SEED = 7  # that of the recipes


@dataclass(frozen=True, slots=True)
class Entry:
    """A recipe as it is, or with `settings`, under a `name` of its own then; trained with `seeds` different seeds."""

    recipe: str
    name: str
    settings: tuple[str, ...] = ()
    seeds: int = 1
    also: tuple[str, ...] = ()  # data and options of a second evaluation
    data: tuple[str, ...] = ()  # commands that make more data than the recipe's own

    def runs(self) -> list[tuple[str, int]]:
        """(name of the run, seed)."""
        seeds = [FIRST_SEED + number for number in range(self.seeds)]
        return [(self.name if seed == FIRST_SEED else f"{self.name}-seed{seed}", seed) for seed in seeds]


HEADLINE = (*("facenet", "multi-similarity", "sup-con", "proxy-anchor", "clip-style", "siamese-triplet-5-online-triplets"),)
FASHION = (
    *("caffe-siamese", "caffe-siamese-legacy", "tf-contrastive", "tf-semihard", "batch-all", "batch-hard"),
    *("siamese-triplet-1-softmax", "siamese-triplet-2-siamese", "siamese-triplet-3-triplet", "offline-mined"),
    *("siamese-triplet-4-online-pairs", "siamese-triplet-5-online-triplets"),
)
EMOJI = (
    *("torch-triplet", "torch-cosine", "torch-margin-ranking", "pycaffe-triplet", "batch-all-emoji", "batch-hard-emoji"),
    *("facenet", "deep-ranking", "sup-con", "multi-similarity", "proxy-anchor", "arcface", "recall-at-k", "xbm"),
    *("moco-style", "simclr-style", "distill", "matryoshka"),
)
TEXT = (
    *("frozen-text", "frozen-text-random", "frozen-text-far", "frozen-text-near", "frozen-text-mse"),
    *("frozen-text-sigmoid-ce", "frozen-text-projection", "max-margin", "clip-style", "siglip-style"),
)
OWN_MACHINE = ("finetune-timm", "finetune-transformers")  # for eight GPUs: `nearfar check` is what is run of them
# As siamese-triplet measures: all ten classes, other images of them.
TEN = (
    "pack images/fashion-mnist shards/fashion-ten --eval-fraction 0.2 --split record",
    "pack shards/fashion-ten/eval shards/fashion-ten-eval --limit 200",
    "pack shards/fashion-ten/train shards/fashion-ten-triplets --kind triplet --sample random",
)
TEXT_TO_IMAGE = ("shards/emoji-text-eval", "--queries", "positives", "--metrics", "recall_at_1,recall_at_10,mrr")
RELEVANCE = ("shards/emoji-relevance-eval", "--metrics", "triplet_accuracy")
TEN_EVAL = "data.eval=shards/fashion-ten-eval"
PLANNED = (
    Entry("dimensionality-reduction", "dimensionality-reduction"),
    *(Entry(recipe, recipe, seeds=3 if recipe in HEADLINE else 1) for recipe in FASHION),
    Entry("caffe-siamese", "caffe-siamese-10d", ("encoder.dim=10",)),
    Entry("siamese-triplet-3-triplet", "offline-ten-classes", ("data.train=shards/fashion-ten-triplets", TEN_EVAL), data=TEN),
    Entry(
        "siamese-triplet-5-online-triplets", "online-ten-classes", ("data.train=shards/fashion-ten/train", TEN_EVAL), data=TEN
    ),
    *(Entry(recipe, recipe, seeds=3 if recipe in HEADLINE else 1) for recipe in EMOJI if recipe != "deep-ranking"),
    Entry("deep-ranking", "deep-ranking", also=RELEVANCE),
    *(Entry(recipe, recipe, seeds=3 if recipe in HEADLINE else 1, also=TEXT_TO_IMAGE) for recipe in TEXT),
)
