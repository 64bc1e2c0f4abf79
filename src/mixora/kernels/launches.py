"""What kernel `triton` runs on the device. Imported with the first launch, since Triton need not be installed.

A table tells programs what they compute, one int32 row of `WIDTH` numbers each: the first of its columns among the
hidden of all sites, how many they are; the first column of its site's router outputs, how many; the first of its
site's K slots, how many; whether it is the first program of its site. All arithmetic is in fp32.
"""

import triton
import triton.language as tl

from mixora.host.devices import is_triton_interpreted

WIDTH = tl.constexpr(7)
IS_INTERPRETED = tl.constexpr(is_triton_interpreted())


@triton.jit
def _read(pointer, is_in):
    numbers = tl.load(pointer, is_in, 0.0)
    if IS_INTERPRETED:
        # the interpreter multiplies the bits of bfloat16 as if they were integers
        numbers = numbers.to(tl.float32)
    return numbers


@triton.jit
def _read_row(table_ptr):
    """What the table tells this program."""
    row = table_ptr + tl.program_id(0) * WIDTH
    first, ranks, first_z, experts = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return first, ranks, first_z, experts, tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)


@triton.jit
def _tokens_of_program(T: tl.constexpr):
    """In 64 bits: tokens times columns may be more than 32 hold."""
    return tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)


@triton.jit
def _load(pointer, token_T, columns, column_C, is_token, is_column):
    """A block of a matrix with so many columns, 0 outside of it."""
    place_TC = token_T[:, None] * columns + column_C[None, :]
    return tl.load(pointer + place_TC, is_token[:, None] & is_column[None, :], 0)


@triton.jit
def _load_if_given(pointer, token_T, columns, column_C, is_token, is_column):
    """As `_load`, in fp32; zeros where there is no pointer."""
    block_TC = tl.zeros((token_T.shape[0], column_C.shape[0]), tl.float32)
    if pointer is not None:
        block_TC += _load(pointer, token_T, columns, column_C, is_token, is_column).to(tl.float32)
    return block_TC


@triton.jit
def _store(pointer, token_T, columns, column_C, is_token, is_column, numbers_TC):
    """A block of a matrix with so many columns, in its dtype."""
    place_TC = token_T[:, None] * columns + column_C[None, :]
    tl.store(pointer + place_TC, numbers_TC.to(pointer.dtype.element_ty), is_token[:, None] & is_column[None, :])


@triton.jit
def _choose(p_TE, expert_E, slot_K, experts, top_k):
    """The K largest of each row, in falling order: their columns and values [T, K]."""
    experts_TK = tl.zeros((p_TE.shape[0], slot_K.shape[0]), tl.int32)
    values_TK = tl.zeros((p_TE.shape[0], slot_K.shape[0]), tl.float32)
    left_TE = tl.where(expert_E[None, :] < experts, p_TE, -1.0)
    for k in range(top_k):
        # numbers that are none compare with nothing: they must not choose a column that is padding
        best_T = tl.minimum(tl.argmax(left_TE, axis=1), experts - 1)
        is_best_TE = expert_E[None, :] == best_T[:, None]
        value_T = tl.sum(tl.where(is_best_TE, p_TE, 0.0), axis=1)
        experts_TK = tl.where(slot_K[None, :] == k, best_T[:, None], experts_TK)
        values_TK = tl.where(slot_K[None, :] == k, value_T[:, None], values_TK)
        left_TE = tl.where(is_best_TE, -1.0, left_TE)
    return experts_TK, values_TK


@triton.jit
def _multiply(x_ptr, rows_ptr, token_T, is_token, a_at_R, is_rank, w_at_E, is_expert, width, IN: tl.constexpr):
    """The products of T rows of x, each read once, with R rows of experts and E of routers."""
    # 64 bits: tokens times columns may be more than 32 hold
    x_at_T1, a_at_1R = (token_T * width)[:, None], (a_at_R.to(tl.int64) * width)[None, :]
    w_at_1E = (w_at_E.to(tl.int64) * width)[None, :]
    h_TR = tl.zeros((token_T.shape[0], a_at_R.shape[0]), tl.float32)
    z_TE = tl.zeros((token_T.shape[0], w_at_E.shape[0]), tl.float32)
    for start in range(0, width, IN):
        i_I = start + tl.arange(0, IN)
        is_in = i_I < width
        x_TI = _read(x_ptr + x_at_T1 + i_I[None, :], is_token[:, None] & is_in[None, :])
        a_IR = _read(rows_ptr + a_at_1R + i_I[:, None], is_rank[None, :] & is_in[:, None])
        w_IE = _read(rows_ptr + w_at_1E + i_I[:, None], is_expert[None, :] & is_in[:, None])
        h_TR = tl.dot(x_TI, a_IR, h_TR, input_precision="ieee")
        z_TE = tl.dot(x_TI, w_IE, z_TE, input_precision="ieee")
    return h_TR, z_TE


@triton.jit
def _softmax(z_TE, is_expert):
    masked_TE = tl.where(is_expert[None, :], z_TE, float("-inf"))
    power_TE = tl.exp(masked_TE - tl.max(masked_TE, axis=1)[:, None])
    return power_TE / tl.sum(power_TE, axis=1)[:, None]


@triton.jit
def _weigh(p_TE, is_valid, expert_E, slot_K, experts, top_k, RENORMALISE: tl.constexpr):
    """The chosen experts and their weights [T, K]; the latter are 0 on padding."""
    experts_TK, weights_TK = _choose(p_TE, expert_E, slot_K, experts, top_k)
    weights_TK = tl.where(is_valid[:, None], weights_TK, 0.0)
    if RENORMALISE:
        # there is nothing to divide on padding
        weights_TK /= tl.where(is_valid, tl.sum(weights_TK, axis=1), 1.0)[:, None]
    return experts_TK, weights_TK


@triton.jit
def _spread(experts_TK, weights_TK, slot_K, top_k, expert_R):
    """The weight of its expert for each rank, 0 where that was not chosen."""
    gates_TR = tl.zeros((experts_TK.shape[0], expert_R.shape[0]), tl.float32)
    for k in range(top_k):
        chosen_T = tl.sum(tl.where(slot_K[None, :] == k, experts_TK, 0), axis=1)
        weight_T = tl.sum(tl.where(slot_K[None, :] == k, weights_TK, 0.0), axis=1)
        gates_TR += tl.where(expert_R[None, :] == chosen_T[:, None], weight_T[:, None], 0.0)
    return gates_TR


@triton.jit
def shrink(
    x_ptr, rows_ptr, valid_ptr,
    table_ptr, scale_ptr, expert_ptr,
    h_ptr, gated_ptr, z_ptr, p_ptr, weights_ptr, experts_ptr,
    tokens, width, all_ranks, all_experts, all_slots,
    RENORMALISE: tl.constexpr,
    T: tl.constexpr, IN: tl.constexpr, R: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The hidden of one block of columns for T tokens, its site's routing, and the hidden times the gates."""
    first, ranks, first_z, experts, first_k, top_k, is_head = _read_row(table_ptr)
    rank_R, expert_E, slot_K = tl.arange(0, R), tl.arange(0, E), tl.arange(0, K)
    token_T = _tokens_of_program(T)
    is_token, is_rank, is_expert, is_slot = token_T < tokens, rank_R < ranks, expert_E < experts, slot_K < top_k
    a_at_R, w_at_E = first + rank_R, all_ranks + first_z + expert_E
    h_TR, z_TE = _multiply(x_ptr, rows_ptr, token_T, is_token, a_at_R, is_rank, w_at_E, is_expert, width, IN)
    p_TE = _softmax(z_TE, is_expert)
    is_valid = tl.load(valid_ptr + token_T, is_token, 0) != 0
    experts_TK, weights_TK = _weigh(p_TE, is_valid, expert_E, slot_K, experts, top_k, RENORMALISE)
    gate_TR = _spread(experts_TK, weights_TK, slot_K, top_k, tl.load(expert_ptr + a_at_R, is_rank, -1))
    gate_TR *= tl.load(scale_ptr + tl.program_id(0))
    _store(h_ptr, token_T, all_ranks, a_at_R, is_token, is_rank, h_TR)
    _store(gated_ptr, token_T, all_ranks, a_at_R, is_token, is_rank, h_TR * gate_TR)
    if is_head != 0:
        _store(z_ptr, token_T, all_experts, first_z + expert_E, is_token, is_expert, z_TE)
        _store(p_ptr, token_T, all_experts, first_z + expert_E, is_token, is_expert, p_TE)
        _store(weights_ptr, token_T, all_slots, first_k + slot_K, is_token, is_slot, weights_TK)
        _store(experts_ptr, token_T, all_slots, first_k + slot_K, is_token, is_slot, experts_TK)


@triton.jit
def _collect(dgates_TR, experts_TK, slot_K, top_k, expert_R, expert_E):
    """The sum over the ranks of each chosen expert: [T, E], 0 for the others."""
    dgates_TE = tl.zeros((experts_TK.shape[0], expert_E.shape[0]), tl.float32)
    for k in range(top_k):
        chosen_T = tl.sum(tl.where(slot_K[None, :] == k, experts_TK, 0), axis=1)
        sum_T = tl.sum(tl.where(expert_R[None, :] == chosen_T[:, None], dgates_TR, 0.0), axis=1)
        dgates_TE += tl.where(expert_E[None, :] == chosen_T[:, None], sum_T[:, None], 0.0)
    return dgates_TE


@triton.jit
def _undo_gate(dgates_TE, gates_TE, p_TE, RENORMALISE: tl.constexpr):
    """The gradient of the probabilities from that of the gates."""
    # not "> 0": what is not a number must show
    dp_TE = tl.where(gates_TE != 0.0, dgates_TE, 0.0)
    if RENORMALISE:
        total_T = tl.sum(tl.where(gates_TE != 0.0, p_TE, 0.0), axis=1)
        mean_T = tl.sum(dp_TE * gates_TE, axis=1)
        # there is nothing to divide on padding
        share_T = 1.0 / tl.where(total_T != 0.0, total_T, 1.0)
        dp_TE = tl.where(gates_TE != 0.0, (dp_TE - mean_T[:, None]) * share_T[:, None], 0.0)
    return dp_TE


@triton.jit
def shrink_backward(
    dgated_ptr, h_ptr, p_ptr, weights_ptr, experts_ptr, dgates_ptr, dp_ptr, dz_ptr,
    table_ptr, scale_ptr, expert_ptr,
    out_ptr,
    tokens, all_ranks, all_experts, all_slots,
    RENORMALISE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The gradients of one site's hidden and router outputs for T tokens, out of that of the gated hidden.

    Gradients that reach the gates, the probabilities or the router's outputs from elsewhere are added where given.
    """
    first, ranks, first_z, experts, first_k, top_k, _ = _read_row(table_ptr)
    scale, columns = tl.load(scale_ptr + tl.program_id(0)), all_ranks + all_experts
    token_T, expert_E, slot_K = _tokens_of_program(T), tl.arange(0, E), tl.arange(0, K)
    is_token, is_expert, is_slot = token_T < tokens, expert_E < experts, slot_K < top_k
    z_at_E, k_at_K = first_z + expert_E, first_k + slot_K
    experts_TK = _load(experts_ptr, token_T, all_slots, k_at_K, is_token, is_slot).to(tl.int32)
    weights_TK = _load(weights_ptr, token_T, all_slots, k_at_K, is_token, is_slot)
    dgates_TE = _load_if_given(dgates_ptr, token_T, all_experts, z_at_E, is_token, is_expert)
    for start in range(0, ranks, R):
        rank_R = start + tl.arange(0, R)
        a_at_R, is_rank = first + rank_R, rank_R < ranks
        expert_R = tl.load(expert_ptr + a_at_R, is_rank, -1)
        h_TR = _load(h_ptr, token_T, all_ranks, a_at_R, is_token, is_rank).to(tl.float32)
        dgated_TR = _load(dgated_ptr, token_T, all_ranks, a_at_R, is_token, is_rank).to(tl.float32) * scale
        dh_TR = dgated_TR * _spread(experts_TK, weights_TK, slot_K, top_k, expert_R)
        _store(out_ptr, token_T, columns, a_at_R, is_token, is_rank, dh_TR)
        dgates_TE += _collect(dgated_TR * h_TR, experts_TK, slot_K, top_k, expert_R, expert_E)

    gates_TE = _spread(experts_TK, weights_TK, slot_K, top_k, expert_E)
    p_TE = _load(p_ptr, token_T, all_experts, z_at_E, is_token, is_expert)
    dp_TE = _load_if_given(dp_ptr, token_T, all_experts, z_at_E, is_token, is_expert)
    dp_TE += _undo_gate(dgates_TE, gates_TE, p_TE, RENORMALISE)
    dz_TE = p_TE * (dp_TE - tl.sum(p_TE * dp_TE, axis=1)[:, None])
    dz_TE += _load_if_given(dz_ptr, token_T, all_experts, z_at_E, is_token, is_expert)
    _store(out_ptr, token_T, columns, all_ranks + z_at_E, is_token, is_expert, dz_TE)
