"""Structures of FisherMatrices: what an approximation may be, with one set of operations."""

from fisher_lab.matrices.base import DampingStyle as DampingStyle
from fisher_lab.matrices.base import FisherMatrix as FisherMatrix
from fisher_lab.matrices.base import Operator as Operator
from fisher_lab.matrices.blocks import BlockDiagonal as BlockDiagonal
from fisher_lab.matrices.blocks import FactoredRows as FactoredRows
from fisher_lab.matrices.dense import Dense as Dense
from fisher_lab.matrices.diagonal import DiagonalMatrix as DiagonalMatrix
from fisher_lab.matrices.direct_sum import DirectSum as DirectSum
from fisher_lab.matrices.eigenbasis import EigenbasisDiagonal as EigenbasisDiagonal
from fisher_lab.matrices.kronecker import Kronecker as Kronecker
from fisher_lab.matrices.low_rank import LowRank as LowRank
from fisher_lab.matrices.low_rank import ShiftedLowRank as ShiftedLowRank
from fisher_lab.matrices.streamed import Streamed as Streamed
from fisher_lab.matrices.vocabulary import VocabularyBlock as VocabularyBlock
