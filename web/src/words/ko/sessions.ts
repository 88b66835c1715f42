/** Sessions: kept, opened again, shared, compared, taken away as a file. */
export const sessions = {
  Session: "세션",
  Sessions: "세션",
  "All sessions": "모든 세션",
  "The open session": "열린 세션",
  "Save the session": "세션 저장",
  "Write a note": "메모 쓰기",
  kept: "보관본",
  "not saved": "저장 안 됨",
  "another session's": "다른 세션의 것",
  // The panel
  "Name of the session": "세션 이름",
  "Nothing is open. Save what is on the screen, or open a session.":
    "열린 세션이 없습니다. 화면에 있는 것을 저장하거나 세션을 여세요.",
  "From the file {file}: it is nowhere but here. Read only until you import it.":
    "파일 {file}에서 열었습니다. 여기에만 있으며, 가져오기 전에는 읽기 전용입니다.",
  "Reached by a link, prompts taken out. Read only.":
    "링크로 열었습니다. 프롬프트는 가려졌습니다. 읽기 전용.",
  "Reached by a link. Read only; a copy of your own can be changed.":
    "링크로 열었습니다. 읽기 전용이며, 내 사본은 바꿀 수 있습니다.",
  "Revision {revision}": "개정 {revision}",
  "Revision {number}, {at}": "개정 {number}, {at}",
  "An older revision than the latest, which is number {number}.":
    "이전 개정입니다. 최신은 {number}번입니다.",
  "Unsaved changes": "저장하지 않은 변경",
  Undo: "되돌리기",
  "Save as the latest": "최신으로 저장",
  "Save as a session": "세션으로 저장",
  Save: "저장",
  "Open the latest": "최신 열기",
  "Close it": "닫기",
  "Connection lost; what others add is not seen here.":
    "연결이 끊겨 다른 사람이 더한 것이 보이지 않습니다.",
  "Not saved: somebody else has saved this session since.":
    "저장하지 못함: 그사이 다른 사람이 이 세션을 저장했습니다.",
  "Not saved: {author} saved revision {number} meanwhile ({at}).":
    "저장하지 못함: 그사이 {author}이(가) 개정 {number}을(를) 저장했습니다({at}).",
  "Nothing is lost: keep yours as a session of its own, or give it up for theirs.":
    "잃은 것은 없습니다. 내 것을 별도 세션으로 두거나, 포기하고 그쪽을 여세요.",
  "Keep mine as a fork": "내 것을 포크로 저장",
  "Open theirs": "그쪽 것 열기",
  "Name of the copy": "사본 이름",
  Import: "가져오기",
  Fork: "포크",
  Share: "공유",
  History: "이력",
  // Scans and notes
  Scans: "스캔",
  "No scan yet. What you scan stands here, and is kept once you save.":
    "아직 스캔이 없습니다. 스캔하면 여기 나타나고, 저장하면 보관됩니다.",
  "Label of scan {n}": "스캔 {n}의 이름표",
  label: "이름표",
  arrived: "도착",
  "Show scan {n}": "스캔 {n} 보기",
  Show: "보기",
  "Hang scan {n} beside the shown one": "스캔 {n}을 보이는 것 옆에 배치",
  "Take scan {n} out of the session": "스캔 {n}을 세션에서 빼기",
  "Take it out": "빼기",
  "from {author}": "{author}에게서",
  "{count} scan goes with the next save.": "다음 저장 때 스캔 {count}개가 빠집니다.",
  "{count} scans go with the next save.": "다음 저장 때 스캔 {count}개가 빠집니다.",
  "Put back": "되돌리기",
  "My scans join it as they finish": "내 스캔이 끝나면 세션에 추가",
  Notes: "메모",
  "Nobody has noted anything.": "메모가 없습니다.",
  "the session": "세션 전체",
  "this scan": "이 스캔",
  "the chosen component": "선택한 컴포넌트",
  "Remove note {n}": "메모 {n} 지우기",
  "Note {n}": "메모 {n}",
  "New note": "새 메모",
  "What do you see?": "무엇이 보이나요?",
  "What the note is about": "메모의 대상",
  "Note it": "메모하기",
  "Noted.": "메모했습니다.",
  "Kept until this tab is closed; for good once the session is saved.":
    "이 탭을 닫을 때까지 보관됩니다. 세션을 저장하면 계속 남습니다.",
  // Links
  read: "읽기",
  "read and fork": "읽기와 포크",
  "read, fork and add scans": "읽기, 포크, 스캔 추가",
  "Allows to": "허용",
  For: "대상",
  whom: "누구에게",
  Lasts: "기한",
  "for good": "무기한",
  "a day": "하루",
  "a week": "일주일",
  "30 days": "30일",
  "Take prompts out (read only)": "프롬프트 가리기 (읽기 전용)",
  "Make a link": "링크 만들기",
  "The link": "링크",
  Copy: "복사",
  "Copied.": "복사했습니다.",
  "Copy it now.": "지금 복사하세요.",
  "It is shown this once; whoever has it can open the session.":
    "이번 한 번만 표시됩니다. 링크가 있으면 누구나 세션을 열 수 있습니다.",
  revoked: "철회됨",
  expired: "만료됨",
  "until {at}": "{at}까지",
  "no prompts": "프롬프트 없음",
  Revoke: "철회",
  "Revoke the link {name}": "링크 {name} 철회",
  "There is no link yet: nobody else can open it.": "아직 링크가 없어 다른 사람은 열 수 없습니다.",
  // All of them
  "Find a session": "세션 찾기",
  "Find by name, note, prompt, label or model": "이름, 메모, 프롬프트, 이름표, 모델로 찾기",
  "ID or link of a session": "세션의 ID 또는 링크",
  "ID or link": "ID 또는 링크",
  "Open a file (.nmri)": "파일 열기 (.nmri)",
  "Compare with a file": "파일과 비교",
  "What you changed in “{name}” is not saved.": "“{name}”에서 바꾼 것이 저장되지 않았습니다.",
  "Save it first": "먼저 저장",
  "Open without saving": "저장하지 않고 열기",
  Stay: "그대로 있기",
  "Pin “{name}”": "“{name}” 고정",
  "Pinned: stands first": "고정됨: 맨 위에 표시",
  Pin: "고정",
  "New name of “{name}”": "“{name}”의 새 이름",
  Rename: "이름 변경",
  "{count} scan": "스캔 {count}개",
  "{count} scans": "스캔 {count}개",
  "{count} note": "메모 {count}개",
  "{count} notes": "메모 {count}개",
  "{count} key image": "핵심 영상 {count}개",
  "{count} key images": "핵심 영상 {count}개",
  "revision {number}": "개정 {number}",
  forked: "포크됨",
  imported: "가져옴",
  "open now": "지금 열림",
  "Delete it, its revisions and its links?": "개정과 링크까지 모두 삭제할까요?",
  Delete: "삭제",
  Keep: "유지",
  "Compare with “{name}”": "“{name}”과(와) 비교",
  "Rename “{name}”": "“{name}” 이름 변경",
  "Fork “{name}”": "“{name}” 포크",
  "Delete “{name}”": "“{name}” 삭제",
  "Asking the service for your sessions…": "서비스에 세션 목록을 묻는 중…",
  "The list is not there; a file opens without the service.":
    "목록이 없습니다. 파일은 서비스 없이도 열립니다.",
  "No session has all of these words in its name, notes, prompts, labels or models.":
    "이름, 메모, 프롬프트, 이름표, 모델에 이 단어가 모두 있는 세션이 없습니다.",
  "You have no session yet. Scan something, then save it with U: it is listed here.":
    "아직 세션이 없습니다. 스캔한 뒤 U 키로 저장하면 여기 나타납니다.",
  More: "더 보기",
  // Beside each other
  "Beside “{name}”": "“{name}” 옆",
  "the same": "같음",
  changed: "바뀜",
  "only here": "여기에만",
  "only there": "저기에만",
  "Notes: {added} more here, {removed} more there.": "메모: 여기 {added}개, 저기 {removed}개 더.",
  "The list of what differs is the service's, which has not this file.":
    "차이 목록은 서비스가 만드는데, 서비스에 이 파일이 없습니다.",
  "The list of what differs is the service's, which compares sessions of yours.":
    "차이 목록은 서비스가 내 세션끼리 비교해 만듭니다.",
  "That session holds no scan that a picture can be made of.":
    "그 세션에는 영상으로 보일 스캔이 없습니다.",
  // Told
  "“{text}” is no session's ID and no link to one. An ID looks like {example}.":
    "“{text}”은(는) 세션의 ID도 링크도 아닙니다. ID는 {example} 같은 모양입니다.",
  "Opening…": "여는 중…",
  "Saving…": "저장 중…",
  "Exporting…": "내보내는 중…",
  "Comparing…": "비교하는 중…",
  "Opened “{name}”.": "“{name}”을(를) 열었습니다.",
  "There is no session {id} of yours: it was deleted, or it is somebody else's. Ask for a link to it.":
    "내 세션 중에 {id}이(가) 없습니다. 삭제되었거나 다른 사람의 것입니다. 링크를 요청하세요.",
  "There is no session {id} of yours with this revision.":
    "내 세션 중에 이 개정을 가진 {id}이(가) 없습니다.",
  "This link leads nowhere: it has expired, was revoked, or is not whole.":
    "이 링크는 열리지 않습니다. 만료되었거나 철회되었거나 잘렸습니다.",
  "The session holds no scans yet.": "세션에 아직 스캔이 없습니다.",
  "Nothing is open. What is on the screen can be saved as a session.":
    "열린 세션이 없습니다. 화면에 있는 것을 세션으로 저장할 수 있습니다.",
  "Left out: {count} that another session keeps.": "다른 세션의 스캔 {count}개는 뺐습니다.",
  "Left out: {scan}, which the service has no more.": "서비스에 더는 없는 스캔은 뺐습니다: {scan}.",
  "Saved as revision {number}.": "개정 {number}(으)로 저장했습니다.",
  Untitled: "제목 없음",
  "Compared with “{name}”.": "“{name}”과(와) 비교했습니다.",
  "This session has been deleted. What is on the screen stays until you leave.":
    "이 세션은 삭제되었습니다. 화면의 내용은 나갈 때까지 남습니다.",
  "{author} saved revision {number}.": "{author}이(가) 개정 {number}을(를) 저장했습니다.",
  Somebody: "누군가",
  "A {kind} scan arrived: {what}": "{kind} 스캔이 도착했습니다: {what}",
  "The file was not opened.": "파일을 열지 못했습니다.",
  "What you changed is not saved yet: save it first, or undo the changes.":
    "바꾼 것이 아직 저장되지 않았습니다. 먼저 저장하거나 되돌리세요.",
  "Undo the changes": "저장한 상태로 되돌리기",
  "The session holds no table {name} of this scan": "세션에 이 스캔의 {name} 표가 없습니다",
  // What is wrong with a file
  "This is no .nmri file, or it was cut short.": ".nmri 파일이 아니거나 잘렸습니다.",
  "The file is cut short or damaged: its list of parts points nowhere.":
    "파일이 잘렸거나 손상되었습니다. 항목 목록이 없는 곳을 가리킵니다.",
  "The file is larger than a browser opens: import it into the service instead.":
    "브라우저가 열기에는 너무 큽니다. 서비스로 가져오세요.",
  "The file has no manifest.json: it is no session's.":
    "파일에 manifest.json이 없습니다. 세션 파일이 아닙니다.",
  "The file holds results, and no session.": "파일에 결과만 있고 세션이 없습니다.",
  "The file holds {entry}, which is no part of a session's file.":
    "파일에 세션 파일의 항목이 아닌 {entry}이(가) 있습니다.",
  "{entry} stands in the file twice.": "{entry}이(가) 파일에 두 번 있습니다.",
  "{entry} is compressed or encrypted: expected it as it is.":
    "{entry}이(가) 압축되었거나 암호화되었습니다. 그대로여야 합니다.",
  "{entry} is damaged: its checksum differs.": "{entry}이(가) 손상되었습니다. 체크섬이 다릅니다.",
  "{entry} is damaged: its bytes have the hash {found}, and {expected} is expected.":
    "{entry}이(가) 손상되었습니다. 해시가 {found}인데 {expected}이어야 합니다.",
  "{entry} is named in the file and missing from it.": "{entry}은(는) 파일에 적혀 있지만 없습니다.",
  "{entry} is not named by manifest.json.": "{entry}은(는) manifest.json에 없습니다.",
  "{entry} belongs to no result of the file.":
    "{entry}은(는) 파일의 어느 결과에도 속하지 않습니다.",
  "{entry} is of version {version}; this viewer reads up to version {known}.":
    "{entry}은(는) 버전 {version}입니다. 이 뷰어는 버전 {known}까지 읽습니다.",
  "{entry} cannot be read: it is no JSON.": "{entry}을(를) 읽을 수 없습니다. JSON이 아닙니다.",
  "{entry} cannot be read: {why}.": "{entry}을(를) 읽을 수 없습니다: {why}.",
  "{entry} says it holds {found}; its result says {expected}.":
    "{entry}은(는) {found}(이)라 하지만 결과는 {expected}(이)라 합니다.",
} as const;
