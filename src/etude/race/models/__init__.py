"""Reference models, small and plain, whose slots (norm, activation, residual placement) any method can fill."""

from etude.race.models.convnet import ConvNet as ConvNet
from etude.race.models.coordinate import siren as siren
from etude.race.models.graph import GraphTransformer as GraphTransformer
from etude.race.models.mlp import mlp as mlp
from etude.race.models.mlp import residual_mlp as residual_mlp
from etude.race.models.transformer import GPT as GPT
from etude.race.models.transformer import ViT as ViT

__all__ = ["GPT", "ConvNet", "GraphTransformer", "ViT", "mlp", "residual_mlp", "siren"]
