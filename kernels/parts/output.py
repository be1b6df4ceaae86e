"""O on its way out: an accumulator's rows, rounded, from registers straight to memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from .rounding import round_into
from .wgmma import row_in_tile


@cute.jit
def write_rows(acc: cute.Tensor, target: cute.Tensor, first_row, thread):
    """An accumulator, rounded, to rows first_row and up of a (rows, columns) tensor in memory, but for rows past its end.

    Neighbouring lanes exchange every other pair of columns, so that a lane writes 8 bytes and the four of a row a sector.
    """
    lane = thread % 4
    odd = lane % 2 == 1
    rounded = cute.make_rmem_tensor(cute.size(acc), target.element_type)
    round_into(rounded, acc)
    words = cute.recast_tensor(rounded, Int32)
    for i in [*range(0, cute.size(words), 4)]:  # words i and i + 2 are of one row, columns 8 apart; i + 1 and i + 3 of the other
        for r in range(2):
            a, b = words[i + r], words[i + r + 2]
            got = cute.arch.shuffle_sync_bfly(a if odd else b, offset=1)
            words[i + r], words[i + r + 2] = (got if odd else a), (b if odd else got)
    for r in cutlass.range_constexpr(2):
        row = first_row + row_in_tile(thread, r)
        if row < target.shape[0]:
            for place, i in enumerate([*range(r, cute.size(words), 4)]):
                piece = cute.make_rmem_tensor(2, Int32)
                piece[0], piece[1] = words[i], words[i + 2]
                cute.autovec_copy(
                    cute.recast_tensor(piece, target.element_type),
                    cute.local_tile(target[row, None], (4,), (4 * place + 2 * (lane % 2) + lane // 2,)),
                )
