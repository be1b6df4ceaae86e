"""Online softmax of one warpgroup's 64 rows (paper, section 2.3; Milakov and Gimelshein, arXiv 1805.02867).

Each thread holds two rows' share: m, the running maximum of the scores, times scale_log2, and l, the running sum of
exponentials over this thread's columns only; the four lanes of a row add their shares once, at the end.

m need not be the true maximum: O and l stay as they are while that rises, P grows beyond 1, and the division by l at the
end makes it exact. So m follows only when the maximum has risen by more than a factor of 2**rescale_from (FlashAttention-4,
arXiv 2603.05451). And it need not be looked for (`presume`): that it has risen too far shows in the sums of P.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32

from . import wgmma
from .wgmma import row_of

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@dataclass(frozen=True)
class OnlineSoftmax:
    """m and l of this thread's two rows; scale_log2 is softmax_scale · log2(e), so that exponentials are powers of 2."""

    rescale_from: Constexpr[float]
    highest_p: Constexpr[float]
    scale_log2: Float32
    m: cute.Tensor
    l: cute.Tensor
    correction: cute.Tensor

    @classmethod
    def start(cls, rescale_from, highest_p, scale_log2):
        m, l, correction = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
        return cls(rescale_from, highest_p, scale_log2, m, l, correction)

    @cute.jit
    def reset(self):
        self.m.fill(-Float32.inf)
        self.l.fill(0.0)

    @cute.jit
    def step(self, S: cute.Tensor):
        """S becomes P = exp(S - m), in place; l takes it in; correction is what O must be multiplied with for it."""
        highest = self.first_row(S)
        self.second_row(S, highest)

    @cute.jit
    def presume(self, S: cute.Tensor):
        """A step on the presumption that m needn't move: S becomes P. Returns the rows' sums, for `take_in`, and whether they are
        those of a presumption that holds: no higher than any P may be. Where m is -inf it doesn't.
        """
        s, l_tile = wgmma.flat(S), [Float32(0.0), Float32(0.0)]
        for r in cutlass.range_constexpr(2):
            for i in row_of(S, r):
                p = exp2(s[i] * self.scale_log2 - self.m[r])
                s[i] = p
                l_tile[r] = p if i == row_of(S, r)[0] else l_tile[r] + p
        return l_tile, l_tile[0] <= self.highest_p and l_tile[1] <= self.highest_p

    def take_in(self, l_tile):
        """What `presume` summed, into l."""
        for r in range(2):
            self.l[r] = self.l[r] + l_tile[r]

    @cute.jit
    def first_row(self, S: cute.Tensor):
        """The step of row half 0. Returns this thread's own maximum."""
        highest = self.maximum(S, 0, -Float32.inf)
        self.exponentials(S, 0)
        return highest

    @cute.jit
    def second_row(self, S: cute.Tensor, highest):
        """The step of row half 1, whose maximum is made to wait for the first row's (`highest`) by a select whose outcome
        only NaN could change: left alone, ptxas takes both maxima first, and the special-function unit idles meanwhile.
        """
        seed = -Float32.inf if highest >= self.m[0] or highest < self.m[0] else highest
        self.maximum(S, 1, seed)
        self.exponentials(S, 1)

    @cute.jit
    def maximum(self, S: cute.Tensor, r: cutlass.Constexpr[int], seed):
        """m takes in row half r of S, starting from seed (-inf). Returns this thread's own maximum of it."""
        s, row, m_old = wgmma.flat(S), row_of(S, r), self.m[r]
        highest = seed
        for i in row:
            highest = cute.arch.fmax(highest, s[i])
        m_new = cute.arch.fmax(m_old, quad_max(highest) * self.scale_log2)
        if cutlass.const_expr(self.rescale_from > 0):
            m_new = m_new if m_new - m_old > self.rescale_from else m_old
        self.m[r] = m_new
        self.correction[r] = exp2(m_old - self.finite(r))
        return highest

    @cute.jit
    def exponentials(self, S: cute.Tensor, r: cutlass.Constexpr[int]):
        """Row half r of S becomes P, and l takes it in."""
        s, row, m = wgmma.flat(S), row_of(S, r), self.finite(r)
        l_tile = Float32(0.0)
        for i in row:
            p = exp2(s[i] * self.scale_log2 - m)
            s[i] = p
            l_tile = p if i == row[0] else l_tile + p
        self.l[r] = self.l[r] * self.correction[r] + l_tile

    @cute.jit
    def finite(self, r: cutlass.Constexpr[int]):
        """m of a row; 0 for -inf (nothing seen so far), which must not meet itself in a subtraction."""
        return Float32(0.0) if self.m[r] == -Float32.inf else self.m[r]

    @cute.jit
    def rescale(self, O: cute.Tensor):
        """O, accumulated against the old maxima, is brought to the new ones, if any row of the warp has one."""
        if cutlass.const_expr(self.rescale_from > 0):
            moved = self.correction[0] != 1.0 or self.correction[1] != 1.0
            if cute.arch.vote_any_sync(moved):
                scale_rows(O, self.correction)
        else:
            scale_rows(O, self.correction)

    @cute.jit
    def finish(self, O: cute.Tensor):
        """O is normalised; m becomes the log-sum-exp of each row (natural log). Empty rows: zeros, and -inf."""
        for r in cutlass.range_constexpr(2):
            self.l[r] = quad_sum(self.l[r])
            lse = self.m[r] * LN_2 + cute.math.log(self.l[r], fastmath=True)
            self.m[r] = -Float32.inf if self.l[r] == 0.0 else lse
            self.correction[r] = cute.arch.rcp_approx(self.l[r])
        scale_rows(O, self.correction)
        if cute.arch.vote_any_sync(self.l[0] == 0.0 or self.l[1] == 0.0):
            o = wgmma.flat(O)
            for i in [*range(cute.size(o))]:  # a select, not a product: a masked V may have left NaN
                o[i] = Float32(0.0) if self.l[i // 2 % 2] == 0.0 else o[i]


@cute.jit
def scale_rows(O: cute.Tensor, factor: cute.Tensor):
    o = wgmma.flat(O)
    for i in [*range(cute.size(o))]:  # a list, so that the loop is Python's
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
