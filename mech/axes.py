"""The vocabulary of dimensions: one word for one thing, in signatures and in results.

jaxtyping annotations and the dimensions of every ``xarray`` result use these words and no others, so that
``scores.sel(layer=3, head=5)`` means the same whichever experiment made ``scores``.
"""

EXAMPLE = "example"
LAYER = "layer"
HEAD = "head"
CONDITION = "condition"
TOKEN = "token"

WORDS = {
    EXAMPLE: "one sample of the data set",
    "batch": "one row of a batch",
    LAYER: "a decoder layer, counted from 0 (vision layers are named `vision_layer`)",
    HEAD: "a query head of a layer",
    "kv_head": "a key/value head; `head // (n_heads / n_kv_heads)` under grouped-query attention",
    "pos": "a position of the sequence, padding included",
    "position": "one position of the sequence, patched by itself",
    "region": "one set of positions, patched together: a cell of a picture, a box, a word",
    "receiver_region": "one set of positions at which a receiver reads",
    "query_pos": "the position that attends",
    "key_pos": "the position that is attended to",
    "d_model": "the width of the residual stream",
    "d_head": "the width of a head",
    "d_mlp": "the hidden width of an MLP",
    "set": "a named set of tokens",
    CONDITION: "one setting of an experiment (a band of heads, a method, a draw)",
    TOKEN: "a visual token of one image, row by row",
    "shown": "one head that is drawn over them",
    "corner": "left, top, right, bottom of a token's pixels",
    "ranking": "one of several rankings of heads",
    "other": "the ranking it is compared with",
    "found_on": "the task whose top heads are meant",
    "tested_on": "the task that they are ablated on",
    "sender": "a part of the model that writes to the residual stream, at one end of an edge",
    "receiver": "a part of the model that reads the residual stream, at the other end",
    "place": "a place in a list, the best first",
    "tracked": "a token whose rank or logit was asked for",
    "factor": "what the output of heads is multiplied by",
    "bias": "what is added to attention scores before the softmax",
    "band": "how a set of heads was chosen",
    "k": "how many of the first candidates count",
    "check": "one cell or edge whose estimate is compared with exact patching",
    "picture": "one image, tile or frame that the vision stack is given",
    "y": "a row of pixels",
    "x": "a column of pixels",
    "patch": "one patch of pixels, where the processor cuts pictures itself",
    "depth": "relative depth in the model, 0 at the first layer, 1 behind the last",
    "timed": "a share of dense heads whose speed was measured",
    "turn": "one of the times that runs took turns, when they were timed",
}
