// The explorer as a page: requests go to the server that the page is from, the state is the part of the address behind #.
import { explore } from "./explorer.js";

const ask = async request => {
  const answer = await fetch("ask", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request),
  }).catch(() => null);
  if (!answer) return { error: { given: "mech no longer answers", expected: "a running `mech explore`", do: "start it again" } };
  if (!answer.ok) return { error: { given: await answer.text(), expected: "", do: "reload the page" } };
  return answer.json();
};

const explorer = explore(document.querySelector("main"), ask, {
  link: location.hash.slice(1),
  moved: link => history.pushState(null, "", "#" + link),
  whole: () => location.href,
});
addEventListener("popstate", () => explorer.go(location.hash.slice(1)));
