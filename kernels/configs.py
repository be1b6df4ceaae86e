"""Kernel configs: frozen data that fully decides a compiled kernel.

A config is the key of every cache, prints as one line, and is refused when it is built if the hardware can't run it.
This file imports nothing heavy: planning and looking up a cached kernel never load the DSL.
"""

from dataclasses import dataclass, fields
from functools import partial

SHARED_MEMORY_LIMIT = 227 * 1024  # bytes a block may use on Hopper (CUDA C++ guide, compute capability 9.0)
REGISTER_FILE = 64 * 1024  # 32-bit registers on an SM
WARPGROUP = 128  # threads
SCHEDULE_STAGES = 2  # tiles that a CTA has been told of and that not all its warps have begun
DTYPE_BYTES = {"fp16": 2, "bf16": 2}


class ConfigError(ValueError):
    """A config that can't run, or whose fields contradict each other; the message says why, with the numbers."""


def _one_line(config):
    parts = (f"{f.name}={getattr(config, f.name)!r}" for f in fields(config))
    return f"{type(config).__name__}({', '.join(parts)})"


def _one_of(config, name, allowed):
    got = getattr(config, name)
    if got not in allowed:
        raise ConfigError(f"{name} must be one of {allowed}, got {got!r}")


@dataclass(frozen=True, repr=False)
class ForwardConfig:
    """One forward kernel: O = softmax(Q Kᵀ · scale) V over tiles of tile_m queries and tile_n keys.

    dtype: "fp16" or "bf16", of Q, K, V and O.
    head_dim: 64, 128 or 256, of Q, K, V and O.
    mask: "none", or "causal" aligned to the bottom right.
    tile_m: queries a CTA owns at a time; 64 for each consumer warpgroup, so 64, 128 or 192.
    tile_n: keys of one step of the mainloop, a multiple of 16.
    stages: tiles of K, and of V, that are in flight.
    extra_k_stages: tiles of K in flight beyond those, -1 to 2: a tile of queries needs its first K before anything else.
    extra_q_slots: places for 64 rows of Q in shared memory beyond the one of each warpgroup: the next tile's come there early.
    warp_specialised: a producer warpgroup does all loading; without, a consumer warp loads between its WGMMAs, one step ahead
        (for comparison: the paper's Table 2).
    pingpong: warpgroups take turns on the tensor cores, one's softmax under the other's GEMMs (paper, section 3.1).
    overlap: S of the next tile is issued before the softmax of this one (paper, section 3.2, Algorithm 2).
    scheduler: "single", one CTA a tile; "persistent", one CTA an SM, each with its list of tiles; or "dynamic", one CTA
        an SM, each taking the next tile that is left (parts/schedule.py).
    q_in_registers: Q is read from shared memory once a tile and not once a step.
    rescale_from: O is rescaled once a row's maximum has risen by more than 2 to this power (parts/softmax.py); with 0, on
        every tile, and without a branch.
    late_release: with overlap, K's stage is released, and O awaited, after the first row's exponentials and not before.
    presume: with overlap, P of a tile without a mask is taken against the maximum known before it, and the maximum of its scores
        only where a row's sum shows that the two are too far apart; then S is computed again, from K in global memory.
    lse: write the log-sum-exp of each query row.
    """

    dtype: str = "bf16"
    head_dim: int = 128
    mask: str = "none"
    tile_m: int = 128
    tile_n: int = 128
    stages: int = 2
    extra_k_stages: int = 0
    extra_q_slots: int = 0
    warp_specialised: bool = True
    pingpong: bool = True
    overlap: bool = True
    scheduler: str = "dynamic"
    q_in_registers: bool = False
    rescale_from: float = 8.0
    late_release: bool = False
    presume: bool = False
    lse: bool = True

    family = "forward"

    def __post_init__(self):
        one_of = partial(_one_of, self)
        one_of("dtype", tuple(DTYPE_BYTES))
        one_of("head_dim", (64, 128, 256))
        one_of("mask", ("none", "causal"))
        one_of("tile_m", (64, 128, 192))
        one_of("scheduler", ("single", "persistent", "dynamic"))
        if not (16 <= self.tile_n <= 256 and self.tile_n % 16 == 0):
            raise ConfigError(f"tile_n must be a multiple of 16 from 16 to 256, got {self.tile_n!r}")
        if not 0 <= self.rescale_from <= 8:
            raise ConfigError(f"rescale_from must be from 0 to 8, for P to stay within fp16, got {self.rescale_from!r}")
        if not 1 <= self.stages <= 8:
            raise ConfigError(f"stages must be from 1 to 8, got {self.stages!r}")
        one_of("extra_k_stages", (-1, 0, 1, 2))
        one_of("extra_q_slots", tuple(range(self.consumer_warpgroups + 1)))
        if self.k_stages < 1:
            raise ConfigError("extra_k_stages=-1 with stages=1 leaves K none")
        if self.overlap and min(self.stages, self.k_stages) < 2:
            raise ConfigError(f"overlap keeps two tiles in flight and needs 2 stages of K and of V, got {self.k_stages} and {self.stages}")
        if self.late_release and not self.overlap:
            raise ConfigError("late_release places a wait of the overlapped mainloop and needs overlap=True, got False")
        if self.presume and not self.overlap:
            raise ConfigError("presume is for the overlapped mainloop and needs overlap=True, got False")
        if self.presume and self.late_release and self.mask == "none":
            raise ConfigError("late_release places a wait that no tile has with presume=True and mask='none'")
        if not self.warp_specialised:
            for name, needed in (("mask", "none"), ("overlap", True), ("pingpong", False)):
                if getattr(self, name) != needed:
                    raise ConfigError(f"warp_specialised=False needs {name}={needed!r}, got {getattr(self, name)!r}")
            if self.scheduler == "dynamic":
                raise ConfigError("warp_specialised=False has no warp to claim tiles: scheduler can't be 'dynamic'")
            if self.q_waits:
                raise ConfigError("warp_specialised=False loads Q ahead and needs extra_q_slots=tile_m/64 or q_in_registers=True")
            if 0 < self.extra_q_slots < self.consumer_warpgroups:
                raise ConfigError(
                    f"warp_specialised=False has a tile's Q side by side: extra_q_slots 0 or tile_m/64, got {self.extra_q_slots}"
                )
            if self.o_borrows_v:
                raise ConfigError(f"{self}: without a producer warpgroup no stage of V is lent to O, which finds no other place")
        if 0 < self.extra_q_slots < self.consumer_warpgroups and not self.pingpong:
            # a place then serves one warpgroup after another, and one that is a round ahead would take a full place for its own
            raise ConfigError(f"extra_q_slots={self.extra_q_slots} of tile_m/64 = {self.consumer_warpgroups} needs pingpong=True")
        three_take_turns = self.pingpong and self.consumer_warpgroups == 3
        if self.mask == "causal" and self.overlap and three_take_turns and self.o_borrows_v and self.stages < 3:
            # one warpgroup, idle in a tile, waits for V in the place that another holds until it gets the first one's turn
            raise ConfigError(
                f"{self} lends a stage of V to O and needs stages >= 3 for three warpgroups with a causal mask, got {self.stages}"
            )
        if self.pingpong and self.consumer_warpgroups < 2:
            raise ConfigError(f"pingpong needs two consumer warpgroups, got tile_m={self.tile_m} (one)")
        if self.shared_memory > SHARED_MEMORY_LIMIT:
            raise ConfigError(
                f"{self} needs {self.shared_memory} bytes of shared memory, a Hopper block has {SHARED_MEMORY_LIMIT}"
            )
        if self.o_buffers < 1:
            raise ConfigError(
                f"{self} leaves O neither {self.tile_m} rows of shared memory of its own (of {SHARED_MEMORY_LIMIT} bytes) "
                f"nor a stage of V that holds {self.o_columns} columns of them"
            )
        if self.live_registers > self.consumer_registers:
            raise ConfigError(
                f"{self} keeps at least {self.live_registers} registers live in a consumer thread, "
                f"which gets {self.consumer_registers}"
            )
        if max(self.tile_n, self.head_dim) // 2 + 30 > self.entry_registers:  # ptxas's own rule, found by trying (C7602)
            raise ConfigError(
                f"{self} has WGMMAs whose accumulator takes {max(self.tile_n, self.head_dim) // 2} registers; "
                f"with {self.threads} threads ptxas counts on {self.entry_registers} and wants 30 beside it"
            )

    __repr__ = _one_line

    @property
    def consumer_warpgroups(self):
        return self.tile_m // 64

    @property
    def threads(self):
        """Threads of a CTA: the producer warpgroup, if there is one, and the consumers."""
        return WARPGROUP * (self.warp_specialised + self.consumer_warpgroups)

    @property
    def registers(self):
        """Registers of a (producer, consumer) thread after setmaxnreg (paper, section 3.1); () where there is no producer."""
        if not self.warp_specialised:
            return ()
        two = (56, 224) if self.head_dim == 256 else (24, 240)  # a tile of d 256 is four TMA loads
        return {1: (56, 256), 2: two, 3: (32, 160)}[self.consumer_warpgroups]

    @property
    def consumer_registers(self):
        return self.registers[1] if self.warp_specialised else self.entry_registers

    @property
    def entry_registers(self):
        """Registers of every thread at entry: the register file's equal share, in steps of 8, 255 at most."""
        return min(255, REGISTER_FILE // self.threads // 8 * 8)

    @property
    def live_registers(self):
        """Registers that the tiles alone hold in a consumer thread: S and O in fp32, Q, and P where it waits beside the next S."""
        S, O = 64 * self.tile_n // WARPGROUP, 64 * self.head_dim // WARPGROUP
        Q = self.head_dim // 4 if self.q_in_registers else 0
        return S + O + Q + (S // 2 if self.overlap else 0)

    @property
    def tile_bytes(self):
        """Bytes of the shared-memory tiles: 64 rows of Q, one stage of K (or V), O where it has its own."""
        element = DTYPE_BYTES[self.dtype]
        row = self.head_dim * element
        return {
            "Q": 64 * row,
            "K": self.tile_n * row,
            "O": 0 if self.o_borrows_v else self.tile_m * row,
        }

    @property
    def k_stages(self):
        """Tiles of K in flight."""
        return self.stages + self.extra_k_stages

    @property
    def kv_stages(self):
        """Tiles of K and of V in flight together."""
        return self.k_stages + self.stages

    @property
    def q_slots(self):
        """Places for a warpgroup's rows of Q in shared memory."""
        return self.consumer_warpgroups + self.extra_q_slots

    @property
    def q_waits(self):
        """Whether the next Q must wait for its place until this tile's last S."""
        return self.extra_q_slots < self.consumer_warpgroups and not self.q_in_registers

    @property
    def o_borrows_v(self):
        """Whether O leaves through a stage of V, which is lent out after each tile: where there is no room for its own."""
        rows = 64 * self.q_slots + self.tile_m + self.kv_stages * self.tile_n
        return rows * self.head_dim * DTYPE_BYTES[self.dtype] + self.barrier_bytes > SHARED_MEMORY_LIMIT

    @property
    def o_columns(self):
        """Columns of O that leave at a time: all, or of a lent stage of V what a TMA store takes in one piece."""
        return 64 if self.o_borrows_v else self.head_dim

    @property
    def o_buffers(self):
        """Places for o_columns of O, used in turn."""
        return min(self.head_dim // 64, self.tile_n * self.head_dim // (self.tile_m * 64)) if self.o_borrows_v else 1

    @property
    def barrier_bytes(self):
        """mbarriers, full and empty, for Q, each stage of K and V, and the schedule, and its slots; padded for the tiles."""
        return -(-(8 * 2 * (self.q_slots + SCHEDULE_STAGES + self.kv_stages) + 16 * SCHEDULE_STAGES) // 1024) * 1024

    @property
    def shared_memory(self):
        """Bytes of dynamic shared memory a CTA asks for."""
        t = self.tile_bytes
        return self.barrier_bytes + self.q_slots * t["Q"] + t["O"] + self.kv_stages * t["K"]


@dataclass(frozen=True, repr=False)
class BackwardConfig:
    """One backward call: dQ, dK and dV over tiles of tile_m queries and tile_n keys, and the kernels before and after it.

    dtype: "fp16" or "bf16", of Q, K, V, O, dO, dQ, dK and dV.
    head_dim: 64, 128 or 256, of all of them.
    mask: "none", or "causal" aligned to the bottom right.
    tile_m: queries of one step of the mainloop.
    tile_n: keys a CTA owns: 64 at head_dim 256, else 128.
    cluster: CTAs that exchange dS, and so add up dQ of all their keys before it goes to memory: 1 at head_dim 64, 2 at 256, else either.
    deterministic: key tiles add to dQ in a fixed order.
    """

    dtype: str = "bf16"
    head_dim: int = 128
    mask: str = "none"
    tile_m: int = 64
    tile_n: int = 128
    cluster: int = 1
    deterministic: bool = False

    family = "backward"
    query_stages = 2  # tiles of Q, and of dO, in flight

    def __post_init__(self):
        one_of = partial(_one_of, self)
        one_of("dtype", tuple(DTYPE_BYTES))
        one_of("head_dim", (64, 128, 256))
        one_of("mask", ("none", "causal"))
        one_of("tile_n", (64,) if self.wide else (128,))
        one_of("cluster", {64: (1,), 128: (1, 2), 256: (2,)}[self.head_dim])  # at 256 a CTA alone has no registers for its dQ beside S
        one_of("tile_m", {64: (128,), 128: (16, 32, 48, 64), 256: (64,)}[self.head_dim])
        if self.shared_memory > SHARED_MEMORY_LIMIT:
            raise ConfigError(
                f"{self} needs {self.shared_memory} bytes of shared memory, a Hopper block has {SHARED_MEMORY_LIMIT}"
            )

    __repr__ = _one_line

    @property
    def threads(self):
        """Threads of a CTA: the producer warpgroup, two consumers, and the one that has dQ, if there is one."""
        return (3 + self.dq_warpgroup) * WARPGROUP

    @property
    def registers(self):
        """Registers of a (producer, consumer) thread after setmaxnreg; between them, those of a thread that has dQ, if there is one."""
        return (24, 72, 208) if self.dq_warpgroup else (24, 240)

    @property
    def entry_registers(self):
        """Registers of every thread at entry: the register file's equal share, in steps of 8."""
        return REGISTER_FILE // self.threads // 8 * 8

    @property
    def wide(self):
        """Whether dK and dV of 64 keys take a warpgroup's registers each, so that a warpgroup has but one of them (backward_wide.py)."""
        return self.head_dim == 256

    @property
    def dq_warpgroup(self):
        """Whether dQ has a warpgroup of its own; else the consumers compute it, half each."""
        return not self.wide

    @property
    def in_pairs(self):
        """Whether CTAs work in pairs that send dS to each other's dQ warpgroup; in clusters at head_dim 256 the consumers have dQ."""
        return self.dq_warpgroup and self.cluster == 2

    @property
    def ds_buffers(self):
        """Places for dS in shared memory: with two, one barrier a step is enough; at head_dim 256 there is room for one, where P comes too."""
        return 1 if self.wide else 2

    @property
    def turns_kept_by_two(self):
        """Whether, where the order is fixed, one warp waits for turns to add to dQ and another one passes them on: where two have nothing to do."""
        return self.deterministic and self.wide

    @property
    def dv_parts(self):
        """Groups of WGMMAs that dV has in a step: with two the first need not wait for all of P, and ptxas finds registers for LSE."""
        return 2 if self.head_dim == 64 and self.deterministic else 1

    @property
    def half_hidden(self):
        """Whether the second half of a tile of keys may be hidden from all queries of a tile that sees the first half."""
        return self.mask == "causal" and self.dq_warpgroup and self.tile_m < self.tile_n

    @property
    def counts_finished(self):
        """Whether it is counted for which heads dQ is complete, so that its last kernel can begin while this one ends. A list that ends with
        short tiles leaves few SMs idle meanwhile: with a causal mask, and neither order nor pairs, counting loses 0.3 to 1.7 %.
        """
        return self.mask == "none" or self.deterministic or self.cluster == 2

    @property
    def last_keys_first(self):
        """Whether CTAs take the last keys first: those that add to dQ in order must not wait for CTAs that start after them, and
        with a causal mask the last keys' tiles come to the same queries sooner. Otherwise the tiles that take longest come first.
        """
        return self.deterministic

    @property
    def dq_by_rows(self):
        """Whether an accumulator of dQ has 64 queries for rows; else 64 of head_dim."""
        return self.wide

    @property
    def keys_in_registers(self):
        """Of the keys of a tile, those whose K dQ's warpgroup has in registers, all that its accumulator leaves: they are then not read from
        shared memory for each part of dQ.
        """
        return 48 if self.head_dim == 64 else 0

    @property
    def dq_part(self):
        """(queries, columns) of dQ's tile that an accumulator has."""
        if self.wide:
            return 64, self.head_dim // (2 * self.cluster)
        return min(self.tile_m, 64), 64

    @property
    def dq_parts(self):
        """Accumulators that hold a tile of dQ together."""
        return 2 * self.cluster if self.wide else 2

    @property
    def accumulator_size(self):
        """fp32 numbers of dQ's tile that a thread holds."""
        return self.tile_m * self.head_dim // (self.dq_parts * WARPGROUP)

    @property
    def scheduler(self):
        """"single", a CTA for each tile of keys (or a cluster); or "dynamic", a CTA an SM, that claims one after another (parts/schedule.py)."""
        return "single" if self.wide else "dynamic"

    @property
    def k_stages(self):
        """Tiles of K in flight: dQ of a tile's last queries, which needs its K, comes beside the next tile's first S, if there is room."""
        return 2 if self.scheduler == "dynamic" and self.cluster == 1 else 1

    @property
    def v_stages(self):
        """Tiles of V in flight."""
        return 2 if self.head_dim == 64 else 1

    @property
    def outputs_abreast(self):
        """Whether there is room for dK and dV side by side on their way out; else they go one after the other."""
        return self.head_dim == 64

    @property
    def out_columns(self):
        """Columns of dK, or dV, that leave at a time."""
        return 64 if self.in_pairs else self.head_dim

    @property
    def tile_bytes(self):
        """Bytes of the shared-memory tiles: one stage of Q (or dO), K (or V), one buffer of dS; and, or 0, what dK and dV leave through,
        and the columns of K that belong to the other CTA's keys and this one's part of dQ.
        """
        element = DTYPE_BYTES[self.dtype]
        keys = self.tile_n * self.head_dim * element
        return {
            "Q": self.tile_m * self.head_dim * element,
            "K": keys,
            "dS": self.tile_m * self.tile_n * self.cluster * element,
            "other K": self.tile_n * self.head_dim // 2 * element if self.cluster == 2 else 0,
            "out": 0 if self.wide else self.tile_n * self.out_columns * element * (1 + self.outputs_abreast),
        }

    @property
    def barrier_bytes(self):
        """mbarriers of the stages of K, V, Q, dO and the schedule, full and empty, and of dS, P, claims and turns; the schedule's slots;
        a page of zeros; LSE and delta of the stages; padded.
        """
        stages = 2 * self.query_stages
        rings = 8 * 2 * (self.k_stages + self.v_stages + self.in_pairs + stages + SCHEDULE_STAGES) + 16 * SCHEDULE_STAGES
        page = 4 * 128
        return -(-(rings + 8 * (self.ds_buffers * 3 + 5) + page + 4 * self.tile_m * stages) // 1024) * 1024

    @property
    def shared_memory(self):
        """Bytes of dynamic shared memory a CTA asks for."""
        t = self.tile_bytes
        queries, keys = 2 * self.query_stages * t["Q"], (self.k_stages + self.v_stages) * t["K"]
        return self.barrier_bytes + queries + keys + t["other K"] + self.ds_buffers * t["dS"] + t["out"]
