"""Draw the loss of each chunk of a long text, one line per model, as a page."""

from ray_abliterate.pipeline.text_evaluation import TextResults


def text_page(text: TextResults) -> str:
    """Return the page as HTML: loss in nats per token over the text; it needs no network."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for name, chunks in text.chunks.items():
        x, y = [c.start for c in chunks], [c.loss for c in chunks]
        hover = [
            f"chunk {c.index}, {c.tokens} tokens, perplexity {c.perplexity:.4g}" for c in chunks
        ]
        figure.add_trace(Scatter(x=x, y=y, name=name, mode="lines", text=hover))
    figure.update_layout(
        title="Loss along the text",
        xaxis_title="token",
        yaxis_title="nats per token",
        hovermode="x unified",
        template="plotly_white",
    )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
