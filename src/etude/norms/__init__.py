"""Norms, x → x̂: which axes share statistics, times what is learned after them."""

from etude.norms._calibrate import Calibrated as Calibrated
from etude.norms._calibrate import Source as Source
from etude.norms._calibrate import calibrate as calibrate
from etude.norms._calibrate import restore as restore
from etude.norms._norm import Norm as Norm
from etude.norms._swap import layers as layers
from etude.norms._swap import swap as swap
from etude.norms._token import TokenNorm as TokenNorm
from etude.norms.batches import batch_channel_norm as batch_channel_norm
from etude.norms.batches import ghost_batch_norm as ghost_batch_norm
from etude.norms.conditional import Conditional as Conditional
from etude.norms.conditional import LayerInstance as LayerInstance
from etude.norms.conditional import LearnableRegionNorm as LearnableRegionNorm
from etude.norms.conditional import RegionNorm as RegionNorm
from etude.norms.conditional import adain as adain
from etude.norms.conditional import adalin as adalin
from etude.norms.conditional import coordinate_aware_modulation as coordinate_aware_modulation
from etude.norms.conditional import learnable_region_norm as learnable_region_norm
from etude.norms.conditional import lin as lin
from etude.norms.conditional import region_norm as region_norm
from etude.norms.conditional import spade as spade
from etude.norms.convert import fold as fold
from etude.norms.convert import pre_crms_norm as pre_crms_norm
from etude.norms.convert import pre_rms_norm as pre_rms_norm
from etude.norms.elementwise import Derf as Derf
from etude.norms.elementwise import DyT as DyT
from etude.norms.elementwise import Elementwise as Elementwise
from etude.norms.elementwise import ElementwiseLayerNorm as ElementwiseLayerNorm
from etude.norms.elementwise import derf as derf
from etude.norms.elementwise import dyt as dyt
from etude.norms.elementwise import elementwise_layer_norm as elementwise_layer_norm
from etude.norms.gated import ada_rms_norm as ada_rms_norm
from etude.norms.gated import gated_norm as gated_norm
from etude.norms.gated import gating_logit_norm as gating_logit_norm
from etude.norms.gated import pre_affine as pre_affine
from etude.norms.gated import seed_norm as seed_norm
from etude.norms.image import ccnorm as ccnorm
from etude.norms.image import evonorm_b0 as evonorm_b0
from etude.norms.image import evonorm_s0 as evonorm_s0
from etude.norms.image import pcnorm as pcnorm
from etude.norms.image import scnorm as scnorm
from etude.norms.named import batch_norm as batch_norm
from etude.norms.named import crms_norm as crms_norm
from etude.norms.named import group_norm as group_norm
from etude.norms.named import instance_norm as instance_norm
from etude.norms.named import layer_norm as layer_norm
from etude.norms.named import partial_rms_norm as partial_rms_norm
from etude.norms.named import rms_norm as rms_norm
from etude.norms.named import scale_norm as scale_norm
from etude.norms.running import online_norm as online_norm
from etude.norms.running import power_norm as power_norm
from etude.norms.running import unified_norm as unified_norm
from etude.norms.standardize import RunningStandardization as RunningStandardization
from etude.norms.standardize import rs_norm as rs_norm
from etude.norms.statistics import adab2n as adab2n
from etude.norms.statistics import adabn as adabn
from etude.norms.statistics import alpha_bn as alpha_bn
from etude.norms.statistics import drift as drift
from etude.norms.statistics import entropy as entropy
from etude.norms.statistics import precise_bn as precise_bn
from etude.norms.statistics import tell_tasks as tell_tasks
from etude.norms.statistics import tent as tent
from etude.norms.statistics import unmix_tns as unmix_tns

__all__ = [
    "Calibrated",
    "Conditional",
    "Derf",
    "DyT",
    "Elementwise",
    "ElementwiseLayerNorm",
    "LayerInstance",
    "LearnableRegionNorm",
    "Norm",
    "RegionNorm",
    "RunningStandardization",
    "Source",
    "TokenNorm",
    "ada_rms_norm",
    "adab2n",
    "adabn",
    "adain",
    "adalin",
    "alpha_bn",
    "batch_channel_norm",
    "batch_norm",
    "calibrate",
    "ccnorm",
    "coordinate_aware_modulation",
    "crms_norm",
    "derf",
    "drift",
    "dyt",
    "elementwise_layer_norm",
    "entropy",
    "evonorm_b0",
    "evonorm_s0",
    "fold",
    "gated_norm",
    "gating_logit_norm",
    "ghost_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layers",
    "learnable_region_norm",
    "lin",
    "online_norm",
    "partial_rms_norm",
    "pcnorm",
    "power_norm",
    "pre_affine",
    "pre_crms_norm",
    "pre_rms_norm",
    "precise_bn",
    "region_norm",
    "restore",
    "rms_norm",
    "rs_norm",
    "scale_norm",
    "scnorm",
    "seed_norm",
    "spade",
    "swap",
    "tell_tasks",
    "tent",
    "unified_norm",
    "unmix_tns",
]
