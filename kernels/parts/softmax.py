"""Online softmax of one warpgroup's 64 rows (paper, section 2.2; Milakov and Gimelshein, arXiv 1805.02867).

Each thread holds two rows' share: m, the running maximum of the raw scores, and l, the running sum of exponentials over
this thread's columns only; the four lanes of a row add their shares once, at the end.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from . import wgmma

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@dataclass(frozen=True)
class OnlineSoftmax:
    """m and l of this thread's two rows; scale_log2 is softmax_scale · log2(e), so that exponentials are powers of 2."""

    scale_log2: Float32
    m: cute.Tensor
    l: cute.Tensor
    correction: cute.Tensor

    @classmethod
    def start(cls, scale_log2):
        m, l, correction = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
        return cls(scale_log2, m, l, correction)

    @cute.jit
    def reset(self):
        self.m.fill(-Float32.inf)
        self.l.fill(0.0)

    @cute.jit
    def step(self, S: cute.Tensor, may_be_empty: cutlass.Constexpr[bool]):
        """S becomes exp(S - m_new) in place, l takes it in; correction is what O must be multiplied with.

        may_be_empty: some row of S may be masked whole, so m may be -inf, which must not meet itself in a subtraction.
        """
        s = wgmma.flat(S)
        for r in cutlass.range_constexpr(2):
            row = [i for i in range(cute.size(s)) if i // 2 % 2 == r]
            m_old, m_new = self.m[r], self.m[r]
            for i in row:
                m_new = cute.arch.fmax(m_new, s[i])
            m_new = quad_max(m_new)
            self.m[r] = m_new
            m_safe = m_new
            if cutlass.const_expr(may_be_empty):
                m_safe = Float32(0.0) if m_new == -Float32.inf else m_new
            shift = m_safe * self.scale_log2
            self.correction[r] = exp2(m_old * self.scale_log2 - shift)
            l_tile = Float32(0.0)
            for i in row:
                p = exp2(s[i] * self.scale_log2 - shift)
                s[i] = p
                l_tile = p if i == row[0] else l_tile + p
            self.l[r] = self.l[r] * self.correction[r] + l_tile

    @cute.jit
    def rescale(self, O: cute.Tensor):
        """O, accumulated against the old maximum, is brought to the new one."""
        scale_rows(O, self.correction)

    @cute.jit
    def finish(self, O: cute.Tensor):
        """O is normalised; m becomes the log-sum-exp of each row (natural log). Empty rows: zeros, and -inf."""
        for r in cutlass.range_constexpr(2):
            l = quad_sum(self.l[r])
            empty = l == 0.0
            self.correction[r] = Float32(0.0) if empty else cute.arch.rcp_approx(l)
            lse = self.m[r] * (self.scale_log2 * LN_2) + cute.math.log(l, fastmath=True)
            self.m[r] = -Float32.inf if empty else lse
        scale_rows(O, self.correction)


@cute.jit
def scale_rows(O: cute.Tensor, factor: cute.Tensor):
    o = wgmma.flat(O)
    for i in cutlass.range_constexpr(cute.size(o)):
        o[i] = o[i] * factor[i // 2 % 2]


def exp2(x):
    """2**x on the special-function unit (ex2.approx.ftz)."""
    return cute.math.exp2(x, fastmath=True)


def quad_max(x):
    """The maximum over the four lanes that share a row."""
    for lane_mask in (2, 1):
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=lane_mask))
    return x


def quad_sum(x):
    """The sum over the four lanes that share a row."""
    for lane_mask in (2, 1):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=lane_mask)
    return x
