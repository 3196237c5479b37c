"""Triton kernels for the divergence: no map ever leaves the chip.

Forward, one program per block of queries, one online pass over blocks of keys (s are scores, p
probabilities):

    KL(row) = Σ_j p_T(j)·(s_T(j) - s_S(j)) - lse_T + lse_S          ∂KL/∂s_S = p_S - p_T

Backward, in one launch: half of the programs own a block of queries and gather ∂x, the other half own a block
of keys and gather ∂y. Both recompute their scores from the saved lse. That takes two more products than
atomic additions would, but every sum has one owner, so the result is the same bit for bit on every run.

Products are taken in the inputs' dtype (float32 in full IEEE precision, no TF32) and accumulated in float32;
offsets are 64 bits. Tensors are contiguous: x, y [batch · heads, tokens, D]; lse, kl [batch · heads, tokens];
weights, keys [batch, tokens]; a bias is [batch or 1, heads or 1, tokens, tokens], its strides 0 where it is
1. Block names: M queries, N keys, D_T and D_S head sizes, each rounded up to a power of two.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

PADDED = tl.constexpr(-1e30)  # not -inf: the difference of two padded scores must be 0, not NaN


@triton.jit
def _load(base, rows, tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of one head: [len(rows), BLOCK], zero beyond the tokens and beyond the head size."""
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < tokens) & (columns[None, :] < SIZE)
    return tl.load(base + rows[:, None].to(tl.int64) * SIZE + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, tokens, values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < tokens) & (columns[None, :] < SIZE)
    offsets = rows[:, None].to(tl.int64) * SIZE + columns[None, :]
    tl.store(base + offsets, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    """a · b, accumulated in float32. WIDEN: for Triton's interpreter, which multiplies the bits of bfloat16, not its
    values."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _exact_dot(a, b, WIDEN: tl.constexpr):
    """a · b with a float32. For a bfloat16 b, a is split into two addends: one would double the error."""
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        return _dot(high, b, WIDEN) + _dot(low, b, WIDEN)
    else:  # noqa: RET505  (Triton compiles the branch that applies, and nothing may follow it)
        return _dot(a, b, WIDEN)


@triton.jit
def _scores(
    x, y, bias, queries, keys, visible, tokens,
    SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Scaled, biased and masked scores: [M, N] float32."""
    scores = _dot(x, tl.trans(y), WIDEN) * (1.0 / tl.sqrt(SIZE * 1.0))
    if HAS_BIAS:
        inside = (queries[:, None] < tokens) & (keys[None, :] < tokens)
        offsets = queries[:, None].to(tl.int64) * tokens + keys[None, :]
        scores += tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.where(visible[None, :], scores, PADDED)


@triton.jit
def _visible(keys_ptr, keys, tokens, HAS_KEYS: tl.constexpr):
    visible = keys < tokens
    if HAS_KEYS:
        visible = visible & (tl.load(keys_ptr + keys, mask=visible, other=0) != 0)
    return visible


@triton.jit
def _online(scores, top, total):
    """The running maximum and sum of exponentials after one more block: new top, factor for the old,
    exponentials."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp(top - new_top)
    exponentials = tl.exp(scores - new_top[:, None])
    return new_top, shrink, exponentials, total * shrink + tl.sum(exponentials, 1)


@triton.jit
def relation_forward(
    x_T, y_T, x_S, y_S, keys_ptr, bias_T, bias_S, stride_T_b, stride_T_h, stride_S_b, stride_S_h,
    lse_T, lse_S, kl, heads, tokens,
    SIZE_T: tl.constexpr, SIZE_S: tl.constexpr, D_T: tl.constexpr, D_S: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_BIAS_S: tl.constexpr,
    WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of M queries, batch · heads). Writes lse_T, lse_S, kl: float32 [batch · heads,
    tokens]."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    queries = tl.program_id(0) * M + tl.arange(0, M)
    bias_T += batch * stride_T_b + head * stride_T_h
    bias_S += batch * stride_S_b + head * stride_S_h
    x_t = _load(x_T + row * tokens * SIZE_T, queries, tokens, SIZE_T, D_T)
    x_s = _load(x_S + row * tokens * SIZE_S, queries, tokens, SIZE_S, D_S)
    top_T = tl.full([M], float("-inf"), tl.float32)
    top_S = tl.full([M], float("-inf"), tl.float32)
    total_T = tl.zeros([M], tl.float32)
    total_S = tl.zeros([M], tl.float32)
    expected = tl.zeros([M], tl.float32)  # Σ exp(s_T - top_T) (s_T - s_S)
    for start in range(0, tokens, N):
        keys = start + tl.arange(0, N)
        visible = _visible(keys_ptr + batch * tokens, keys, tokens, HAS_KEYS)
        y_t = _load(y_T + row * tokens * SIZE_T, keys, tokens, SIZE_T, D_T)
        y_s = _load(y_S + row * tokens * SIZE_S, keys, tokens, SIZE_S, D_S)
        s_T = _scores(x_t, y_t, bias_T, queries, keys, visible, tokens, SIZE_T, HAS_BIAS_T, WIDEN)
        s_S = _scores(x_s, y_s, bias_S, queries, keys, visible, tokens, SIZE_S, HAS_BIAS_S, WIDEN)
        top_T, shrink, e_T, total_T = _online(s_T, top_T, total_T)
        expected = expected * shrink + tl.sum(e_T * (s_T - s_S), 1)
        top_S, _, _, total_S = _online(s_S, top_S, total_S)
    l_T = top_T + tl.log(total_T)
    l_S = top_S + tl.log(total_S)
    inside = queries < tokens
    tl.store(lse_T + row * tokens + queries, l_T, mask=inside)
    tl.store(lse_S + row * tokens + queries, l_S, mask=inside)
    tl.store(kl + row * tokens + queries, expected / total_T - l_T + l_S, mask=inside)


@triton.jit
def _score_gradient(
    x_t, y_t, x_s, y_s, bias_T, bias_S, lse_T, lse_S, weights, queries, keys, visible, tokens,
    SIZE_T: tl.constexpr, SIZE_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_BIAS_S: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """∂loss/∂(x·y) of the student, the scale 1/√d included: [M, N] float32, zero at padding on either
    side."""
    inside = queries < tokens
    l_T = tl.load(lse_T + queries, mask=inside, other=0.0)
    l_S = tl.load(lse_S + queries, mask=inside, other=0.0)
    weight = tl.load(weights + queries, mask=inside, other=0.0) * (1.0 / tl.sqrt(SIZE_S * 1.0))
    s_T = _scores(x_t, y_t, bias_T, queries, keys, visible, tokens, SIZE_T, HAS_BIAS_T, WIDEN)
    s_S = _scores(x_s, y_s, bias_S, queries, keys, visible, tokens, SIZE_S, HAS_BIAS_S, WIDEN)
    return (tl.exp(s_S - l_S[:, None]) - tl.exp(s_T - l_T[:, None])) * weight[:, None]


@triton.jit
def relation_backward(
    x_T, y_T, x_S, y_S, keys_ptr, bias_T, bias_S, stride_T_b, stride_T_h, stride_S_b, stride_S_h,
    lse_T, lse_S, weights, grad_x, grad_y, heads, tokens,
    SIZE_T: tl.constexpr, SIZE_S: tl.constexpr, D_T: tl.constexpr, D_S: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_BIAS_S: tl.constexpr,
    WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, batch · heads, 2). Plane 0 writes grad_x by blocks of M queries, plane 1 grad_y by M
    keys."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    x_T += row * tokens * SIZE_T
    y_T += row * tokens * SIZE_T
    x_S += row * tokens * SIZE_S
    y_S += row * tokens * SIZE_S
    bias_T += batch * stride_T_b + head * stride_T_h
    bias_S += batch * stride_S_b + head * stride_S_h
    lse_T += row * tokens
    lse_S += row * tokens
    weights += batch * tokens
    keys_ptr += batch * tokens
    own = tl.program_id(0) * M + tl.arange(0, M)
    gradient = tl.zeros([M, D_S], tl.float32)
    if tl.program_id(2) == 0:
        x_t = _load(x_T, own, tokens, SIZE_T, D_T)
        x_s = _load(x_S, own, tokens, SIZE_S, D_S)
        for start in range(0, tokens, N):
            keys = start + tl.arange(0, N)
            visible = _visible(keys_ptr, keys, tokens, HAS_KEYS)
            y_t = _load(y_T, keys, tokens, SIZE_T, D_T)
            y_s = _load(y_S, keys, tokens, SIZE_S, D_S)
            scores = _score_gradient(
                x_t, y_t, x_s, y_s, bias_T, bias_S, lse_T, lse_S, weights, own, keys, visible, tokens,
                SIZE_T, SIZE_S, HAS_BIAS_T, HAS_BIAS_S, WIDEN,
            )  # fmt: skip
            gradient += _exact_dot(scores, y_s, WIDEN)
        _store(grad_x + row * tokens * SIZE_S, own, tokens, gradient, SIZE_S, D_S)
    else:
        visible = _visible(keys_ptr, own, tokens, HAS_KEYS)
        y_t = _load(y_T, own, tokens, SIZE_T, D_T)
        y_s = _load(y_S, own, tokens, SIZE_S, D_S)
        for start in range(0, tokens, N):
            queries = start + tl.arange(0, N)
            x_t = _load(x_T, queries, tokens, SIZE_T, D_T)
            x_s = _load(x_S, queries, tokens, SIZE_S, D_S)
            scores = _score_gradient(
                x_t, y_t, x_s, y_s, bias_T, bias_S, lse_T, lse_S, weights, queries, own, visible, tokens,
                SIZE_T, SIZE_S, HAS_BIAS_T, HAS_BIAS_S, WIDEN,
            )  # fmt: skip
            gradient += _exact_dot(tl.trans(scores), x_s, WIDEN)
        _store(grad_y + row * tokens * SIZE_S, own, tokens, gradient, SIZE_S, D_S)
