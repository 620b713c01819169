"""``reference:smol``: a pretrained language model that was given a vision stack, in the architecture of LLaVA.

The other reference models learned all they know from the haystacks. This one's language model is SmolLM2-135M-Instruct
(30 layers of 9 heads), which could retrieve from text before it saw a picture. A small vision tower and a projector
show it the embeddings of the words that a picture contains (``words``), and LoRA on its attention makes it answer.

``assembly`` puts it together from the base's own package (``base``) and the adapter in mech, which ``train`` made.
"""
