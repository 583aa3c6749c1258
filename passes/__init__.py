"""The tricks, one a file: every pass that the compiler ships, listed explicitly.

Third parties add theirs through the entry point group `onnxslim_llm.passes`.
"""

from __future__ import annotations

from onnxslim_llm.passes.cleanup.cleanup import Cleanup
from onnxslim_llm.passes.cleanup.deduplicate_initializers import DeduplicateInitializers
from onnxslim_llm.passes.cleanup.eliminate_common_subexpressions import EliminateCommonSubexpressions
from onnxslim_llm.passes.cleanup.fold_constants import FoldConstants
from onnxslim_llm.passes.cleanup.fold_shapes import FoldShapes
from onnxslim_llm.passes.cleanup.inline_branches import InlineBranches
from onnxslim_llm.passes.cleanup.inline_functions import InlineFunctions
from onnxslim_llm.passes.cleanup.lift_constants import LiftConstants
from onnxslim_llm.passes.cleanup.prune_subgraphs import PruneSubgraphs
from onnxslim_llm.passes.cleanup.raise_ir_version import RaiseIrVersion
from onnxslim_llm.passes.cleanup.remove_dead_code import RemoveDeadCode
from onnxslim_llm.passes.cleanup.simplify_algebra import SimplifyAlgebra
from onnxslim_llm.passes.cleanup.tie_weights import TieWeights
from onnxslim_llm.passes.fuse.add_kv_cache import AddKvCache
from onnxslim_llm.passes.fuse.fold_embedding_scale import FoldEmbeddingScale
from onnxslim_llm.passes.fuse.fold_rotary_tables import FoldRotaryTables
from onnxslim_llm.passes.fuse.fuse_activations import FuseActivations
from onnxslim_llm.passes.fuse.fuse_attention import FuseAttention
from onnxslim_llm.passes.fuse.fuse_layer_norm import FuseLayerNorm
from onnxslim_llm.passes.fuse.fuse_rms_norm import FuseRmsNorm
from onnxslim_llm.passes.fuse.fuse_rotary import FuseRotary
from onnxslim_llm.passes.fuse.keep_last_logits import KeepLastLogits
from onnxslim_llm.passes.fuse.pack_projections import PackProjections
from onnxslim_llm.passes.fuse.simplify_masks import SimplifyMasks
from onnxslim_llm.passes.lower.attention.lower_attention import LowerAttention
from onnxslim_llm.passes.lower.attention.lower_kv_cache import LowerKvCache
from onnxslim_llm.passes.lower.convert_opset import ConvertOpset
from onnxslim_llm.passes.lower.npu.fix_inputs import FixInputs
from onnxslim_llm.passes.lower.npu.fix_shapes import FixShapes
from onnxslim_llm.passes.lower.npu.legalize_indices import LegalizeIndices
from onnxslim_llm.passes.lower.npu.legalize_masks import LegalizeMasks
from onnxslim_llm.passes.lower.npu.legalize_means import LegalizeMeans
from onnxslim_llm.passes.lower.npu.lower_npu_ops import LowerNpuOps
from onnxslim_llm.passes.lower.operators.lower_contrib_ops import LowerContribOps
from onnxslim_llm.passes.lower.operators.lower_standard_ops import LowerStandardOps
from onnxslim_llm.passes.lower.stored.raise_block_weights import RaiseBlockWeights
from onnxslim_llm.passes.lower.weights.lower_ort_cpu import LowerOrtCpu
from onnxslim_llm.passes.lower.weights.lower_ort_cpu_ops import LowerOrtCpuOps
from onnxslim_llm.passes.lower.weights.lower_portable import LowerPortable
from onnxslim_llm.passes.lowrank.compensate_low_rank import CompensateLowRank
from onnxslim_llm.passes.lowrank.factor_tensors import FactorTensors
from onnxslim_llm.passes.lowrank.split_low_rank import SplitLowRank
from onnxslim_llm.passes.prune.fold_constant_neurons import FoldConstantNeurons
from onnxslim_llm.passes.prune.prune_heads import PruneHeads
from onnxslim_llm.passes.prune.prune_neurons import PruneNeurons
from onnxslim_llm.passes.prune.prune_vocabulary import PruneVocabulary
from onnxslim_llm.passes.prune.prune_weights import PruneWeights
from onnxslim_llm.passes.prune.remove_blocks import RemoveBlocks
from onnxslim_llm.passes.prune.store_sparse import StoreSparse
from onnxslim_llm.passes.qdq.quantize_activations import QuantizeActivations
from onnxslim_llm.passes.qdq.quantize_dynamically import QuantizeDynamically
from onnxslim_llm.passes.quantize.correct_biases import CorrectBiases
from onnxslim_llm.passes.quantize.quantize_codebook import QuantizeCodebook
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.passes.quantize.recode_in_order import RecodeInOrder
from onnxslim_llm.passes.quantize.rotate_residual import RotateResidual
from onnxslim_llm.passes.quantize.scale_channels import ScaleChannels
from onnxslim_llm.passes.quantize.smooth_activations import SmoothActivations
from onnxslim_llm.passes.quantize.tune_codes import TuneCodes
from onnxslim_llm.rewrite.passes import Pass

__all__ = ["PASSES"]

PASSES: tuple[type[Pass], ...] = (
    Cleanup,
    RaiseIrVersion,
    LiftConstants,
    RemoveDeadCode,
    DeduplicateInitializers,
    FoldConstants,
    FoldShapes,
    SimplifyAlgebra,
    EliminateCommonSubexpressions,
    InlineBranches,
    PruneSubgraphs,
    TieWeights,
    InlineFunctions,
    FuseRmsNorm,
    FuseAttention,
    FuseRotary,
    FoldRotaryTables,
    FuseLayerNorm,
    FuseActivations,
    SimplifyMasks,
    AddKvCache,
    KeepLastLogits,
    FoldEmbeddingScale,
    ScaleChannels,
    SmoothActivations,
    RotateResidual,
    RemoveBlocks,
    PruneHeads,
    PruneVocabulary,
    FoldConstantNeurons,
    PruneNeurons,
    PruneWeights,
    StoreSparse,
    SplitLowRank,
    FactorTensors,
    QuantizeCodebook,
    QuantizeWeights,
    CompensateLowRank,
    CorrectBiases,
    RecodeInOrder,
    TuneCodes,
    PackProjections,
    RaiseBlockWeights,
    FixShapes,
    FixInputs,
    ConvertOpset,
    LowerKvCache,
    LowerAttention,
    LowerNpuOps,
    LegalizeMasks,
    LegalizeIndices,
    LegalizeMeans,
    LowerStandardOps,
    LowerContribOps,
    LowerPortable,
    LowerOrtCpu,
    LowerOrtCpuOps,
    QuantizeActivations,
    QuantizeDynamically,
)
