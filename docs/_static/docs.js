// Views tell how high they are.
addEventListener("message", event => {
  if (!event.data || !event.data.mechHeight) return;
  const frame = [...document.querySelectorAll("iframe.mech")].find(frame => frame.contentWindow === event.source);
  if (frame) frame.style.height = Math.ceil(event.data.mechHeight) + 2 + "px";
});
