"""V → W: the weight that a layer sees, made from what is trained. ``put`` attaches a map, by role or by name."""

from etude.weights._host import put as put
from etude.weights._map import Adapter as Adapter
from etude.weights._map import Map as Map
from etude.weights._merge import disable as disable
from etude.weights._merge import enable as enable
from etude.weights._merge import freeze as freeze
from etude.weights._merge import merge as merge
from etude.weights._merge import remove as remove
from etude.weights._merge import unmerge as unmerge
from etude.weights._peft import load_peft as load_peft
from etude.weights._peft import save_peft as save_peft
from etude.weights._peft import to_lora as to_lora
from etude.weights._quantize import quantize as quantize
from etude.weights._store import load as load
from etude.weights._store import save as save
from etude.weights._weight_norm_init import weight_norm_init as weight_norm_init
from etude.weights.basis import sparsegrad as sparsegrad
from etude.weights.births import corda as corda
from etude.weights.births import eva as eva
from etude.weights.births import lora_init as lora_init
from etude.weights.births import lora_sb as lora_sb
from etude.weights.births import milora as milora
from etude.weights.births import olora as olora
from etude.weights.births import orthogonal_adaptation as orthogonal_adaptation
from etude.weights.births import pissa as pissa
from etude.weights.chain import chain_of_lora as chain_of_lora
from etude.weights.chain import lora_pro as lora_pro
from etude.weights.direction import scaled_weight_standardization as scaled_weight_standardization
from etude.weights.direction import sigma_reparam as sigma_reparam
from etude.weights.direction import spectral_norm as spectral_norm
from etude.weights.direction import weight_conditioning as weight_conditioning
from etude.weights.direction import weight_norm as weight_norm
from etude.weights.direction import weight_standardization as weight_standardization
from etude.weights.elastic import RankBudget as RankBudget
from etude.weights.elastic import RankMigration as RankMigration
from etude.weights.elastic import adalora as adalora
from etude.weights.elastic import elalora as elalora
from etude.weights.givens import goft as goft
from etude.weights.givens import qgoft as qgoft
from etude.weights.hadamard import bat as bat
from etude.weights.hadamard import bone as bone
from etude.weights.hadamard import conv_lora as conv_lora
from etude.weights.hadamard import loha as loha
from etude.weights.hadamard import lokr as lokr
from etude.weights.hypernet import MagnitudeInvariantHypernetwork as MagnitudeInvariantHypernetwork
from etude.weights.hypernet import magnitude_invariant_hypernetwork as magnitude_invariant_hypernetwork
from etude.weights.low_rank import lora as lora
from etude.weights.mask import fish_mask as fish_mask
from etude.weights.mask import magnitude_mask as magnitude_mask
from etude.weights.mixture import Mixture as Mixture
from etude.weights.mixture import goat as goat
from etude.weights.multiplicative import lorma_pi as lorma_pi
from etude.weights.multiplicative import lorma_plus as lorma_plus
from etude.weights.orthogonal import cayley as cayley
from etude.weights.orthogonal import householder as householder
from etude.weights.orthogonal import matrix_exp as matrix_exp
from etude.weights.rotations import boft as boft
from etude.weights.rotations import hra as hra
from etude.weights.rotations import oft as oft
from etude.weights.rotations import oft_v2 as oft_v2
from etude.weights.rotations import orthogonality as orthogonality
from etude.weights.rotations import psoft as psoft
from etude.weights.sampled import fourierft as fourierft
from etude.weights.sampled import shira as shira
from etude.weights.scaling import delora as delora
from etude.weights.scaling import dora as dora
from etude.weights.scaling import ia3 as ia3
from etude.weights.scaling import randlora as randlora
from etude.weights.scaling import rslora as rslora
from etude.weights.scaling import vera as vera
from etude.weights.structured import block_tensor_train as block_tensor_train
from etude.weights.structured import lr_groups as lr_groups
from etude.weights.subspace import clover as clover
from etude.weights.subspace import lora_xs as lora_xs
from etude.weights.subspace import orthonormal_pair as orthonormal_pair
from etude.weights.subspace import orthonormality as orthonormality
from etude.weights.subspace import sorsa as sorsa
from etude.weights.subspace import svft as svft
from etude.weights.timestep import at_timestep as at_timestep
from etude.weights.timestep import t_lora as t_lora
from etude.weights.tuning import TaskNorms as TaskNorms
from etude.weights.tuning import bn_only as bn_only
from etude.weights.tuning import layernorm_tuning as layernorm_tuning
from etude.weights.tuning import layernorm_tuning_cl as layernorm_tuning_cl
from etude.weights.tweak import channel_distance as channel_distance
from etude.weights.tweak import norm_tweaking as norm_tweaking

__all__ = [
    "Adapter", "MagnitudeInvariantHypernetwork", "Map", "Mixture", "RankBudget", "RankMigration", "TaskNorms",
    "adalora", "at_timestep", "bat", "block_tensor_train", "bn_only", "boft", "bone", "cayley", "chain_of_lora",
    "channel_distance", "clover", "conv_lora", "corda", "delora", "disable", "dora", "elalora", "enable", "eva",
    "fish_mask", "fourierft", "freeze", "goat", "goft", "householder", "hra", "ia3", "layernorm_tuning",
    "layernorm_tuning_cl", "load", "load_peft", "loha", "lokr", "lora", "lora_init", "lora_pro", "lora_sb", "lora_xs",
    "lorma_pi", "lorma_plus", "lr_groups", "magnitude_invariant_hypernetwork", "magnitude_mask", "matrix_exp", "merge",
    "milora", "norm_tweaking", "oft", "oft_v2", "olora", "orthogonal_adaptation", "orthogonality", "orthonormal_pair",
    "orthonormality", "pissa", "psoft", "put", "qgoft", "quantize", "randlora", "remove", "rslora", "save", "save_peft",
    "scaled_weight_standardization", "shira", "sigma_reparam", "sorsa", "sparsegrad", "spectral_norm", "svft", "t_lora",
    "to_lora", "unmerge", "vera", "weight_conditioning", "weight_norm", "weight_norm_init", "weight_standardization",
]  # fmt: skip
