_Rows = tuple[int, int, int, int, int, int]  # format, addresses of values and grid, rows, columns, group

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def group_linear_sizes(rows: int, columns: int, group: int, bits: int) -> tuple[int, int]: ...
def group_linear_pack(stored: int, packed: int, rows: int, columns: int, group: int, bits: int) -> None: ...
def group_linear_unpack(packed: int, stored: int, rows: int, columns: int, group: int, bits: int) -> None: ...
def group_linear(
    x: int, codes: int, grid: int, y: int, tokens: int, rows: int, columns: int, group: int, bits: int, threads: int
) -> None: ...
def dense_linear(
    weights: int, rows: int, columns: int, bfloat16: bool, x: int, tokens: int, y: int, threads: int
) -> None: ...
def sparse_ffn(
    x: int,
    gate: int,
    part: tuple[_Rows, int, _Rows, int, bool, float],
    y: int,
    tokens: int,
    threads: int,
) -> None: ...
def norm_rows(x: int, rows: int, width: int, norm: tuple[int, float, float]) -> None: ...
def gate_values(activation: str, gate: int, up: int, count: int) -> None: ...
def rotate_heads(x: int, tokens: int, heads: int, dim: int, cos: int, sin: int, scaling: float) -> None: ...
def attend_heads(
    queries: int,
    tokens: int,
    heads: int,
    dim: int,
    position: int,
    keys: int,
    values: int,
    kv_heads: int,
    length: int,
    window: int,
    out: int,
) -> None: ...
def dense_rows(weights: int, rows: int, columns: int, bfloat16: bool, x: int, tokens: int, y: int) -> None: ...
def codebook_linear(
    x: int,
    codes: int,
    scale: int,
    tables: int,
    y: int,
    tokens: int,
    rows: int,
    columns: int,
    group: int,
    bits: int,
    shared: bool,
    threads: int,
) -> None: ...
def seed_linear_bytes(rows: int, columns: int, bits: int) -> int: ...
def seed_linear(
    x: int,
    codes: int,
    y: int,
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    offset: int,
    threads: int,
    table: bool,
) -> None: ...
def seed_encode(
    w: int, codes: int, rows: int, columns: int, bits: int, offset: int, candidates: int, pick: bool, threads: int
) -> None: ...
def binary_linear_isa() -> str: ...
def binary_linear_peak(rounds: int) -> int: ...
def binary_linear_size(rows: int, segments: int, segment_inputs: int) -> int: ...
def binary_linear_pack(positive: int, codes: int, rows: int, segments: int, segment_inputs: int) -> None: ...
def binary_linear_unpack(codes: int, signs: int, rows: int, segments: int, segment_inputs: int) -> None: ...
def binary_linear(
    x: int,
    codes: int,
    scale: int,
    levels: int,
    planes: int,
    shift: int,
    by_mean: bool,
    y: int,
    tokens: int,
    rows: int,
    inputs: int,
    threads: int,
) -> None: ...
def binary_weight_linear(
    x: int, codes: int, scale: int, y: int, tokens: int, rows: int, inputs: int, threads: int
) -> None: ...
def binary_conv2d(
    x: int,
    size: list[int],
    channels_last: bool,
    codes: int,
    scale: int,
    rows: int,
    levels: int,
    planes: int,
    shift: int,
    by_mean: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    y: int,
    threads: int,
) -> None: ...
def lookup_linear_sizes(rows: int, columns: int, group: int, bits: int) -> tuple[int, int]: ...
def lookup_linear_pack(stored: int, packed: int, rows: int, columns: int, group: int, bits: int) -> None: ...
def lookup_linear_unpack(packed: int, stored: int, rows: int, columns: int, group: int, bits: int) -> None: ...
def lookup_linear(
    x: int, codes: int, grid: int, y: int, tokens: int, rows: int, columns: int, group: int, bits: int, threads: int
) -> None: ...
def garbling_hardware_cipher() -> bool: ...
def garbling_encrypt(key: int, x: int, y: int, blocks: int) -> None: ...
def garbling_hash(key: int, x: int, y: int, blocks: int, tweak: int) -> None: ...
def garbling_garble(
    key: int,
    gates: tuple[int, int, int, int],
    first: int,
    last: int,
    bits: int,
    delta: int,
    labels: int,
    tweak: int,
    tables: int,
) -> None: ...
def garbling_evaluate(
    key: int, gates: tuple[int, int, int, int], first: int, last: int, labels: int, tweak: int, tables: int
) -> None: ...

class Decoder:
    def __init__(self, width: int, norm: tuple[int, float, float], head: tuple[list[tuple], int]) -> None: ...
    def add_block(
        self,
        norms: list[tuple[int, float, float]],
        linears: list[tuple[list[tuple], int]],
        heads: int,
        kv_heads: int,
        head_dim: int,
        scaling: float,
        window: int,
        rotary: int,
        activation: str,
        sparse: list[tuple[_Rows, int, _Rows, int, bool, float]],
    ) -> None: ...
    def run(
        self,
        places: int,
        tokens: int,
        hidden: int,
        caches: list[tuple[int, int]],
        rotaries: list[tuple[int, int]],
        logits: int,
        first_logits: int,
        threads: int,
    ) -> None: ...
